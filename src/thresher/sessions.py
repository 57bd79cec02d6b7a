"""Remembers recent sessions, so that a user of torch.compile can ask what was done."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_RECENT: deque[weakref.ref[Any]] = deque(maxlen=64)


@dataclass(frozen=True)
class Call:
    """One call of a session: what it returned, the model's weights by FQN as they were passed to it, its inputs, and which
    sizes of inputs its graph takes (`graph.size_guards.SizeGuards`)."""

    session: Any
    results: list[Any]
    weights: Mapping[str, torch.Tensor]
    inputs: list[Any]
    sizes: Any


class _Listeners(threading.local):
    """A model is compiled and called in one thread: what other threads do meanwhile is not its own."""

    def __init__(self) -> None:
        self.lists: list[list[Any]] = []
        self.watchers: list[list[Call]] = []


_LISTENERS = _Listeners()


def remember(session: Any) -> None:
    """Add a session to the recent ones, weakly, and to every list that is being collected."""
    _RECENT.append(weakref.ref(session))
    for listener in _LISTENERS.lists:
        listener.append(session)


def recent() -> list[Any]:
    """Sessions that are still alive, oldest first: one for each graph that was compiled."""
    return [s for s in (ref() for ref in _RECENT) if s is not None]


def tell(
    session: Any, results: list[Any], weights: Mapping[str, torch.Tensor], inputs: list[Any], sizes: Any
) -> None:
    """Called with what each call of a session returned, and what it was given."""
    for watcher in _LISTENERS.watchers:
        watcher.append(Call(session, results, weights, inputs, sizes))


class watch:
    """`with watch() as calls:` gathers every `Call` this thread makes meanwhile."""

    def __enter__(self) -> list[Call]:
        self.calls: list[Call] = []
        _LISTENERS.watchers.append(self.calls)
        return self.calls

    def __exit__(self, *_: object) -> None:
        _LISTENERS.watchers = [w for w in _LISTENERS.watchers if w is not self.calls]


class collect:
    """`with collect() as sessions:` gathers the sessions made meanwhile."""

    def __enter__(self) -> list[Any]:
        self.sessions: list[Any] = []
        _LISTENERS.lists.append(self.sessions)
        return self.sessions

    def __exit__(self, *_: object) -> None:
        _LISTENERS.lists = [heard for heard in _LISTENERS.lists if heard is not self.sessions]
