"""Files that somebody else may have written or damaged: what goes wrong in them is one kind of error.

with reading(path, "statistics", "Calibrate the model again."):
    ...  # parse; a KeyError here becomes a ThresherError that names the file
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .errors import ThresherError


@contextlib.contextmanager
def reading(
    path: Any, what: str, fix: str, error: Callable[[str], ThresherError] = ThresherError
) -> Iterator[None]:
    """Within, any exception becomes `error`, whose message names the file and what was wrong in it.

    A ThresherError that names the file already is left as it is. what: what the file should hold. Wrap reading
    and parsing alone: a mistake in other code would look like a damaged file.
    """
    try:
        yield
    except Exception as reason:
        if isinstance(reason, ThresherError) and str(path) in str(reason):
            raise
        raise error(f"{path} does not hold {what}: {said(reason)}. {fix}") from reason


def said(reason: BaseException) -> str:
    """What an exception says, in words that need no traceback, without a full stop."""
    if isinstance(reason, RecursionError):
        return "it is nested too deeply"
    if isinstance(reason, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(reason, KeyError):
        return f"{reason} is missing"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    text = str(reason).split("\n")[0][:300].rstrip(". ")
    plain = isinstance(reason, (ThresherError, ValueError)) or type(reason).__module__ != "builtins"
    return text if plain and text else f"{type(reason).__name__} {text}".strip()
