"""Whether a model was rewritten at all, where Dynamo cuts it into several graphs.

A graph in which nothing was rewritten is worth a warning when it is the model. It is none when it is a part, such as a
vision tower, and another part was rewritten. Dynamo hands graphs over one by one, so what is to be said of a part waits:
until the same call hands over one that was rewritten, and then it is dropped; or until another call, or the process's end.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_WRAPPER = os.path.join("torch", "_dynamo", "eval_frame.py")


class _Waiting(threading.local):
    """What is to be said of one call's graphs. call: which one. rewrote: some graph of it was rewritten."""

    def __init__(self) -> None:
        self.call, self.rewrote = 0, False
        self.say: Callable[[], None] | None = None

    def end(self) -> None:
        say, rewrote = self.say, self.rewrote
        self.call, self.rewrote, self.say = 0, False, None
        if say is not None and not rewrote:
            say()


_WAITING = _Waiting()
atexit.register(lambda: _WAITING.end())


def tell(graph_module: torch.fx.GraphModule, rewrote: bool, say: Callable[[], None] | None) -> bool:
    """Note that a graph was compiled. say: warns that nothing was rewritten, where that is so; at once for a whole model.

    Whether it was said at once.
    """
    call, part = _place()
    if call != _WAITING.call:
        _WAITING.end()
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if not part and not getattr(reason, "graph_break", False):
        if say is not None:
            say()
        return say is not None
    _WAITING.call = call
    _WAITING.rewrote = _WAITING.rewrote or rewrote
    if _WAITING.say is None:
        _WAITING.say = say
    return False


def called() -> None:
    """A compiled graph runs: where it belongs to another call than the one waiting, that one has ended."""
    if _WAITING.say is not None and _place()[0] != _WAITING.call:
        _WAITING.end()


def _place() -> tuple[int, bool]:
    """The outermost compiled call on the stack, and whether code of it is running that is not compiled."""
    frame: Any = sys._getframe(2)
    found, part, between = 0, False, False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith(_WRAPPER):
            found, part = id(frame), between
        elif not name.startswith(_TORCH) and not name.startswith(_OURS) and not name.startswith("<"):
            between = True
        frame = frame.f_back
    return found, part


_OURS = os.path.dirname(__file__) + os.sep
