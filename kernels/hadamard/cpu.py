"""CPU provider of the Hadamard transform: butterflies and one small dense factor, in C++."""

from __future__ import annotations

import ctypes
import functools

import torch

from thresher.formats.hadamard import base_matrix, decompose

from .. import native
from . import op as defs

_MIN_WORK = 1 << 16  # elements; below it a second thread costs more than it saves


@functools.cache
def _kernel():
    function = native.load("hadamard").hadamard_f32
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4 + [ctypes.c_int]
    function.restype = None
    return function


def _accepts(x, signs, block):
    return (
        "The C++ transform computes in fp32; fp64 runs the reference." if x.dtype == torch.float64 else None
    )


@defs.hadamard.provider(
    "cpu_cpp", device="cpu", supported=lambda: native.load_error("hadamard"), supports_args=_accepts
)
def _hadamard_cpu(x, signs, block):
    wide = x.float().contiguous()
    signs = None if signs is None else signs.float().contiguous()
    out = torch.empty_like(wide)
    base = base_matrix(block)
    _, two = decompose(block)  # type: ignore[misc]
    _kernel()(
        wide.data_ptr(),
        out.data_ptr(),
        None if signs is None else signs.data_ptr(),
        base.data_ptr(),
        wide.numel() // x.shape[-1],
        x.shape[-1] // block,
        base.shape[0],
        two,
        torch.get_num_threads() if wide.numel() >= _MIN_WORK else 1,
    )
    return out.to(x.dtype)
