"""Whether a call would rather have its result at once, as PyTorch computes it, than wait for a compiler.

`generate` and a loaded file do not wait: what a compiler needs seconds for is compiled in the background, and until then the
same rewritten program runs node by node. `THRESHER_WAIT=1`, or `wait=True` in a call of `generate` or `load`, has them wait.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

SWITCH = "THRESHER_WAIT"
NO, LAZY, SOON = "no", "lazy", "soon"
_AT_ONCE: ContextVar[str] = ContextVar("thresher_at_once", default=NO)


@contextlib.contextmanager
def at_once(how: str = SOON) -> Iterator[None]:
    """Within the context calls do not wait for compilers.

    how: SOON, what they run is compiled in the background; LAZY, by the first call that waits, if there is one; NO, they
        wait, as they do everywhere if the environment says so.
    """
    token = _AT_ONCE.set(how if os.environ.get(SWITCH, "0") in ("", "0") else NO)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


def is_at_once() -> bool:
    """Whether the caller said so."""
    return _AT_ONCE.get() != NO


def is_soon() -> bool:
    """Whether what a call runs is to be compiled in the background."""
    return _AT_ONCE.get() == SOON
