"""Weights that each decode step reads whole are moved onto huge pages, where they lie.

A step reads a model's weights once and computes little with them, so it is as fast as memory is read. On pages of 4 KB the
processor looks up an address every 4 KB, in a virtual machine through two tables: on one core of an EPYC, sums over
weights went from 24 to 30 GB/s behind this. Most systems let a process ask (`madvise` in
/sys/kernel/mm/transparent_hugepage/enabled) and give none unasked. Linux 6.1 and newer move memory that is in use
(MADV_COLLAPSE); elsewhere, and for weights that lie in a file, nothing is done and nothing is lost.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

VARIABLE = "THRESHER_HUGE_PAGES"
LEAST = 1 << 25
"""Bytes of weights below which nothing is moved: they stay in the processor's cache from step to step."""
SIZE = 1 << 21
_COLLAPSE = 25  # MADV_COLLAPSE of Linux
_ALLOWED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_asked: set[int] = set()  # pages, by their number


def move(tensors: Iterable[torch.Tensor]) -> threading.Thread | None:
    """Ask the system to move the memory of these tensors onto huge pages, in a thread: about 2 ms a page of 2 MB, once.

    Values and addresses stay. Returns the thread, or None where there is nothing to move: too little to matter, moved
    before, THRESHER_HUGE_PAGES=0, or a system that has no such call or whose administrator switched huge pages off.
    """
    held = [(t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu"]
    if sum(size for _, size in held) < LEAST or _call() is None:
        return None
    pages = {n for start, size in held for n in range(start // SIZE, -(-(start + size) // SIZE))} - _asked
    if not pages:
        return None
    _asked.update(pages)
    thread = threading.Thread(target=_move, args=(sorted(pages),), name="thresher-huge-pages", daemon=True)
    thread.start()
    return thread


def _move(pages: list[int]) -> None:
    call = _call()
    for page in pages:
        call(
            page * SIZE, SIZE, _COLLAPSE
        )  # fails where a page is of a file or partly not ours; then it stays as it is


@functools.cache
def _call() -> Any:
    """The C library's madvise, or None where it is not to be asked."""
    if os.environ.get(VARIABLE, "1") == "0":
        return None
    try:
        if "[never]" in _ALLOWED.read_text():
            return None
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return call
