"""Builds the C++ kernels at first use, once per machine and source, and loads them with ctypes.

Plain C functions over raw pointers build in seconds where an extension against torch's headers
takes a minute, and need no ninja. Each source in `csrc/` becomes one shared library, kept under a
name that holds the hash of the source, the compiler, its flags and this CPU's features: a library
is never reused where it would not run. It ends in the hash of its own bytes, which a loader passes over: one that
was cut short or changed on the disk is built again, as is one that another user could have written.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from thresher.files import cache_folder, no_cache, scratch, trusted

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-Wall")
_MARK = b"\nthresher-sha256:"
NOT_BUILT = "It is built at its first use, which takes seconds."
_LOOKING = ContextVar("looking", default=False)


@functools.cache
def compiler() -> str | None:
    """The C++ compiler: `$CXX`, else g++ or clang++ on the PATH."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def unavailable() -> str | None:
    """Why no C++ kernel can run on this machine, or None when they can."""
    if os.environ.get("THRESHER_NATIVE") == "0":
        return "The C++ kernels are switched off by THRESHER_NATIVE=0."
    if compiler() is None:
        return "No C++ compiler was found; install g++ (Debian: apt-get install g++) or set CXX."
    return None


@functools.cache
def cpu_features() -> frozenset[str]:
    """The CPU's feature flags as the kernel names them (avx2, f16c, avx512f, ...); empty if unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


@functools.cache
def _compiler_version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"The compiler {path} does not answer to --version. Set CXX to one that works.")
    return done.stdout.splitlines()[0]


def _build(source: Path, target: Path, compiler_path: str) -> None:
    """Compile into `target`; another process sees a whole library or none."""
    with scratch(target.parent) as made:
        partial = made / target.name
        command = [compiler_path, *_FLAGS, str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if "No space left" in done.stderr:
                raise OSError(errno.ENOSPC, "No space left on device")
            raise RuntimeError(f"Building {source.name} failed: {' '.join(command)}\n{done.stderr[-4000:]}")
        with open(partial, "ab") as file:
            file.write(_MARK + hashlib.sha256(partial.read_bytes()).hexdigest().encode())
        partial.chmod(0o700)
        partial.replace(target)


def _whole(library: Path) -> bool:
    """Whether a library is there as it was built, and nobody but this user, or root, can have written it."""
    if not trusted(library):
        return False
    try:
        content, _, digest = library.read_bytes().rpartition(_MARK)
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest().encode() == digest


@functools.cache
def _own_folder() -> Path:
    """A folder for this process alone, where there is no cache."""
    folder = tempfile.mkdtemp(prefix="thresher-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The shared library of `csrc/NAME.cpp`, built first if need be.

    Raises RuntimeError with the compiler's own words when the build fails.
    """
    path = compiler()
    if path is None:
        raise RuntimeError(unavailable())
    source, library = _SOURCES / f"{name}.cpp", _library(name, path)
    folder = cache_folder("native")
    if folder is not None:
        try:
            if not _whole(folder / library):
                _build(source, folder / library, path)
            return ctypes.CDLL(str(folder / library))
        except OSError as reason:  # read-only, full, or mounted so that nothing in it may run
            no_cache(folder, reason)
    target = _own_folder() / library
    _build(source, target, path)
    return ctypes.CDLL(str(target))


def _library(name: str, compiler_path: str) -> str:
    """The file's name: what is built from these sources by this compiler for this CPU."""
    source = _SOURCES / f"{name}.cpp"
    headers = sorted(_SOURCES.glob("*.h"))
    key = hashlib.sha256(
        b"\0".join(
            [source.read_bytes(), *(h.read_bytes() for h in headers)]
            + [s.encode() for s in (_compiler_version(compiler_path), " ".join(_FLAGS), platform.machine())]
            + [" ".join(sorted(cpu_features())).encode()]
        )
    ).hexdigest()[:16]
    return f"{name}-{key}.so"


@contextlib.contextmanager
def only_looking() -> Iterator[None]:
    """Inside, `load_error` builds nothing: it answers NOT_BUILT for a library that is not there yet."""
    token = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(token)


def load_error(name: str) -> str | None:
    """Why `csrc/NAME.cpp` cannot be used here, or None. For a provider's `supported`."""
    if _LOOKING.get() and unavailable() is None:
        path, folder = compiler(), cache_folder("native")
        try:
            if path is not None and (folder is None or not _whole(folder / _library(name, path))):
                return NOT_BUILT
        except RuntimeError as error:  # the compiler does not answer
            return str(error)
    return _load_error(name)


@functools.cache
def _load_error(name: str) -> str | None:
    reason = unavailable()
    if reason is None:
        try:
            load(name)
        except (RuntimeError, OSError) as error:
            reason = str(error)
    return reason


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """The tensor's first element, for a C function. The caller keeps the tensor alive."""
    return ctypes.c_void_p(tensor.data_ptr())
