"""Where results may be written, and the cache: a folder of the user's own, which nobody else can write to.

What is in the cache is run (kernels) or believed (rewritten programs, measured times), so it is read only where
nobody but this user, or root, can have put it there. Nothing that is wrong with the cache is an error: there is
then no cache, and one warning says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ArgumentError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_SCRATCH = ".scratch-"
_LOCK = ".lock"
_OLD = 3600.0  # seconds, after which a temporary file that nobody holds a lock on was left behind
_state = threading.Lock()
_warned = False
_swept: set[Path] = set()


def cache_dir() -> Path:
    """Where what was built, measured and rewritten is kept: $THRESHER_CACHE_DIR, else $XDG_CACHE_HOME/thresher where
    that is an absolute path (an empty one counts as unset), else ~/.cache/thresher. Always absolute."""
    root = os.environ.get("THRESHER_CACHE_DIR")
    if root:
        return Path(root).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):
        return Path(shared) / "thresher"
    try:
        return Path.home() / ".cache" / "thresher"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"thresher-{os.geteuid()}"


def cache_folder(name: str = "") -> Path | None:
    """The cache's folder of that name, made with mode 700 if need be; None, with one warning, where it cannot be
    used or another user could have put something there. What was left behind in it by killed processes is removed."""
    root = cache_dir()
    folder = root / name
    try:
        for made in (root, folder):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            _own(made)
        _check_parents(root)
        os.listdir(folder)
    except OSError as reason:
        no_cache(folder, reason)
        return None
    with _state:
        new = folder not in _swept
        _swept.add(folder)
    if new:
        _sweep(folder)
    return folder


def trusted(path: Path) -> bool:
    """Whether a file is there that nobody but this user, or root, can have written."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and _ours(found) and not found.st_mode & 0o022


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache, whole or not at all; where it cannot be written, one warning."""
    try:
        with scratch(path.parent) as made:
            partial = made / path.name
            partial.write_bytes(content)
            partial.chmod(0o600)
            partial.replace(path)
    except OSError as reason:
        no_cache(path, reason)


def measurements(name: str) -> dict[str, Any]:
    """What was measured on this machine and kept in the cache's file of that name, by key; empty where nothing was."""
    folder = cache_folder()
    if folder is None or not trusted(folder / name):
        return {}
    try:
        kept = json.loads((folder / name).read_text())
    except (OSError, ValueError, RecursionError):  # cut off by a full disk: measuring again repairs it
        return {}
    return kept if isinstance(kept, dict) else {}


def keep_measurement(name: str, key: str, value: Any) -> None:
    """Add a measurement, plain data, to the cache's file of that name."""
    folder = cache_folder()
    if folder is not None:
        text = json.dumps(measurements(name) | {key: value}, indent=0, sort_keys=True)
        keep(folder / name, text.encode())


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`, gone afterwards; if this process is killed, the next one removes it."""
    made = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
    try:
        with open(made / _LOCK, "w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def no_cache(place: Path, reason: object) -> None:
    """Warn, once a process, that nothing is kept."""
    global _warned
    with _state:
        first, _warned = not _warned, True
    if first:
        said = getattr(reason, "strerror", None) or reason
        warnings.warn(
            f"{place} cannot be used as a cache: {said}. Kernels are built and programs rewritten anew in each "
            "process; set THRESHER_CACHE_DIR to a folder of your own to keep them.",
            stacklevel=3,
        )


def _ours(found: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or found.st_uid in (os.geteuid(), 0)


def _own(folder: Path) -> None:
    """Raise OSError unless the folder belongs to this user, or root; close it to the others' writing."""
    found = os.stat(folder)
    if not _ours(found):
        raise PermissionError(f"it belongs to another user ({found.st_uid})")
    if found.st_mode & 0o022:
        os.chmod(folder, 0o700)


def _check_parents(root: Path) -> None:
    """Raise OSError where anybody could put another folder in the place of the cache's."""
    for parent in root.parents:
        mode = os.stat(parent).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"anybody may replace what is in {parent}")


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed have left."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(_SCRATCH) and path.is_dir() and _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and path.match("tmp*.*") and time.time() - path.stat().st_mtime > _OLD:
                path.unlink(missing_ok=True)  # as earlier versions named theirs


def _abandoned(made: Path) -> bool:
    """Whether no process is at work in a scratch folder: its lock is free, or it never came to have one."""
    try:
        with open(made / _LOCK, "r+") as lock:
            if fcntl is None:
                return time.time() - made.stat().st_mtime > _OLD
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        return time.time() - made.stat().st_mtime > _OLD
    except OSError:
        return False


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


def check_folder(option: str, path: Path) -> None:
    """Raise before minutes of work when a folder of new files cannot be written there: it must be new or empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "which holds files" if path.is_dir() else "which is no folder"
        raise ArgumentError(option, f"{str(path)!r}, {what}", "a new or an empty folder", "Name another.")
    check_writable(option, path / "config.json")
