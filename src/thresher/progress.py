"""Progress bars for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")

_without = False


def no_progress() -> None:
    """From now on this process shows no progress bars."""
    global _without
    _without = True


def shown() -> bool:
    """Whether progress is shown: stderr is a terminal, and nobody has said otherwise."""
    return not _without and sys.stderr.isatty()


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Go through items with a progress bar on stderr; without one where stderr is no terminal."""
    yield from track(
        items, label, total=total, console=Console(stderr=True), transient=True, disable=not shown()
    )
