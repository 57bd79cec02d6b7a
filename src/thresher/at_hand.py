"""Whether a call would rather run in a program that is at hand than in one of its own, which must be made first.

`generate` meets prompts with padding and without. A batch without padding gains little by packing and so has a program of
its own elsewhere; here one more program costs more than it saves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_PREFERRED: ContextVar[bool] = ContextVar("thresher_at_hand", default=False)


@contextlib.contextmanager
def preferred() -> Iterator[None]:
    """Within the context, batches without padding are packed like all others."""
    token = _PREFERRED.set(True)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


def is_preferred() -> bool:
    """Whether the caller said so."""
    return _PREFERRED.get()
