"""What a call of a short model has beside it: the layers that the short one lacks, and what they gave."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..graph.deepen import Layers


@dataclass
class Depth:
    """One call.

    layers: where they are. modules: all of them. cache: the further layers' parts of the cache that the call brings.
    given: results of the short program, as the compiled model has them. further: results of the further layers, in order.
    """

    layers: Layers
    modules: Sequence[torch.nn.Module]
    cache: Sequence[Any] = ()
    given: list[Any] = field(default_factory=list)
    further: list[Any] = field(default_factory=list)


class _Calls(threading.local):
    def __init__(self) -> None:
        self.calls: list[Depth] = []


_CALLS = _Calls()


def current() -> Depth | None:
    """The call of a short model that this thread is in, or None."""
    return _CALLS.calls[-1] if _CALLS.calls else None


@contextlib.contextmanager
def within(call: Depth | None) -> Iterator[None]:
    """Within the context a short model is called; None: what runs is no short model."""
    _CALLS.calls.append(call)  # type: ignore[arg-type]
    try:
        yield
    finally:
        _CALLS.calls.pop()
