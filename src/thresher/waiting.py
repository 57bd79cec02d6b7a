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
_AT_ONCE: ContextVar[bool] = ContextVar("thresher_at_once", default=False)


@contextlib.contextmanager
def at_once(wanted: bool = True) -> Iterator[None]:
    """Within the context calls do not wait for compilers; `wanted` False, or the environment, has them wait."""
    token = _AT_ONCE.set(wanted and os.environ.get(SWITCH, "0") in ("", "0"))
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


def is_at_once() -> bool:
    """Whether the caller said so."""
    return _AT_ONCE.get()
