"""How much memory this process holds; and keeping what was freed for the next call, whose tensors are as large.

A decode step hands back the whole key-value cache, one token longer. With glibc's defaults the cache before it goes
back to the system, and the next step's is asked for anew, page by page: on SmolLM2 with 16 rows of 512 tokens that is
100,000 page faults and two thirds of a padded step's time. PyTorch's own advice is another allocator (jemalloc,
tcmalloc); `keep` asks the same of glibc, for the whole process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

VARIABLE = "THRESHER_KEEP_MEMORY"
_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # of malloc.h
_LARGEST_MMAP = 1 << 25  # glibc takes no more; larger tensors still come from the system each time
_SAID = "Memory of earlier calls is kept for later ones in this process (mallopt); THRESHER_KEEP_MEMORY=0 leaves it be."


@functools.cache
def keep() -> str | None:
    """Once for the process: keep freed memory instead of giving it back. Returns the sentence for the report, or None
    where the environment says no, the C library is not glibc, or another allocator stands in for it."""
    if os.environ.get(VARIABLE, "1") == "0" or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # raises where there is none
        settings = ((_MMAP, _LARGEST_MMAP), (_TRIM, (1 << 31) - 1), (_TOP_PAD, 1 << 26))
        return _SAID if all([library.mallopt(*s) for s in settings]) else None
    except (OSError, AttributeError, TypeError):
        return None


def resident() -> int:
    """Bytes of memory that this process holds now, and where the system does not say, the most it ever held."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def give_back() -> None:
    """Give the system what was freed and the C library has kept; nothing where that is not glibc."""
    try:
        _trim()(0)
    except (OSError, AttributeError, TypeError):
        return


@functools.cache
def _trim() -> Any:
    return ctypes.CDLL(None).malloc_trim
