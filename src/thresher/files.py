"""Where results may be written, and where things are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import ArgumentError


def cache_dir() -> Path:
    """Where what was built, measured and rewritten is kept: $THRESHER_CACHE_DIR, else ~/.cache/thresher."""
    root = os.environ.get("THRESHER_CACHE_DIR")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "thresher"


def check_writable(option: str, path: Path | None) -> None:
    """Raise before minutes of work, not after, when a file cannot be written there. Its folder is made."""
    if path is None:
        return
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise ArgumentError(option, f"{str(path)!r}, which is no file", "a file's path", "Name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ArgumentError(option, f"{str(path)!r}: {error.strerror}", "a path that can be written",
                            "Name another folder.") from None  # fmt: skip
