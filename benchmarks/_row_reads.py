"""What reading some rows of a weight costs by itself: a loop that loads and does nothing else.

No kernel can be faster than this on rows that lie apart. It reads eight rows abreast and asks for the eight
after them, the fastest of the patterns tried (1 to 32 abreast, with and without asking, into either cache).
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from thresher.kernels import native

_SOURCE = r"""
#include <stdint.h>
typedef int64_t line __attribute__((vector_size(64), aligned(1)));
extern "C" int64_t read_rows(const char* weight, const int32_t* index, int64_t count, int64_t bytes) {
    constexpr int ROWS = 8;
    line sum = {};
    auto row = [&](int64_t i) { return weight + int64_t(index[i < count ? i : count - 1]) * bytes; };
    for (int64_t first = 0; first < count; first += ROWS) {
        const char *here[ROWS], *later[ROWS];
        for (int r = 0; r < ROWS; ++r) here[r] = row(first + r), later[r] = row(first + ROWS + r);
        for (int64_t at = 0; at < bytes; at += 64)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                __builtin_prefetch(later[r] + at, 0, 2);
                sum += *(const line*)(here[r] + at);
            }
    }
    return sum[0];
}
"""


@functools.cache
def _function():
    folder = Path(tempfile.mkdtemp(prefix="thresher-reads-"))
    source, library = folder / "reads.cpp", folder / "reads.so"
    source.write_text(_SOURCE)
    command = [
        native.compiler(),
        "-O3",
        "-march=native",
        "-std=c++17",
        "-fPIC",
        "-shared",
        source,
        "-o",
        library,
    ]
    subprocess.run([str(word) for word in command], check=True)
    function = ctypes.CDLL(str(library)).read_rows
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int64
    return function


def read(weight: torch.Tensor, rows: torch.Tensor) -> None:
    """Read these rows (int32, ascending) of a contiguous weight whose rows are whole cache lines, on one thread."""
    _function()(weight.data_ptr(), rows.data_ptr(), len(rows), weight[0].numel() * weight.element_size())
