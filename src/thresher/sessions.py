"""Remembers recent sessions, so that a user of torch.compile can ask what was done."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

_RECENT: deque[weakref.ref[Any]] = deque(maxlen=64)


class _Listeners(threading.local):
    """A model is compiled in the thread that calls it: what other threads make meanwhile is not its own."""

    def __init__(self) -> None:
        self.lists: list[list[Any]] = []


_LISTENERS = _Listeners()
_WATCHERS: list[list[tuple[Any, list[Any]]]] = []


def remember(session: Any) -> None:
    _RECENT.append(weakref.ref(session))
    for listener in _LISTENERS.lists:
        listener.append(session)


def recent() -> list[Any]:
    """Sessions that are still alive, oldest first: one for each graph that was compiled."""
    return [s for s in (ref() for ref in _RECENT) if s is not None]


def tell(session: Any, results: list[Any]) -> None:
    """Called with what each call of a session returned."""
    for watcher in _WATCHERS:
        watcher.append((session, results))


class watch:
    """`with watch() as calls:` gathers (session, results) of every call made meanwhile."""

    def __enter__(self) -> list[tuple[Any, list[Any]]]:
        self.calls: list[tuple[Any, list[Any]]] = []
        _WATCHERS.append(self.calls)
        return self.calls

    def __exit__(self, *_: object) -> None:
        _WATCHERS[:] = [w for w in _WATCHERS if w is not self.calls]


class collect:
    """`with collect() as sessions:` gathers the sessions made meanwhile."""

    def __enter__(self) -> list[Any]:
        self.sessions: list[Any] = []
        _LISTENERS.lists.append(self.sessions)
        return self.sessions

    def __exit__(self, *_: object) -> None:
        _LISTENERS.lists = [heard for heard in _LISTENERS.lists if heard is not self.sessions]
