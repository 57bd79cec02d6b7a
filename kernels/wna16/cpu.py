"""CPU provider of the low-bit linear: fused for a few rows, dequantise-and-multiply for many.

Many rows of bf16 by weights of four bits have a kernel of their own on CPUs with AVX512-BF16, which decodes strips that stay
in the L2 cache; others are dequantised a slab at a time for PyTorch's product.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .. import native
from . import linear as defs

_PAIR_ROWS = {4: 32, 8: 16}  # of bf16 by codes of so many bits, decoded for eight rows at a time
_FUSED_ROWS = 16  # beyond it, one dequantisation costs less than decoding again for every eight rows
_FEW_BF16_ROWS = 8  # the same, of bf16 by four bits in strips, where that kernel does not take the groups
_SLAB = 1 << 20  # weights dequantised at a time: 4 MiB, small beside the weight, large enough for a matmul
_MIN_WORK = 1 << 18  # multiply-adds; below it a second thread costs more than it saves
_SCALE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLANES = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
"""Bytes of an activation where the CPU multiplies integers: finer than the type's own rounding."""
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@functools.cache
def _linear():
    function = native.load("wna16").wna16_linear_f32
    function.argtypes = [_POINTER] * 6 + [_SIZE] * 5 + [_INT] * 4
    function.restype = None
    return function


@functools.cache
def _dequantize():
    function = native.load("wna16").wna16_dequantize_f32
    function.argtypes = [_POINTER] * 4 + [_SIZE] * 6 + [_INT] * 3
    function.restype = None
    return function


@functools.cache
def _dense_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the dense multiply: half types only where the CPU multiplies them faster than fp32."""
    fast = native.cpu_features() & {"amx_bf16", "avx512_bf16"}
    return dtype if dtype == torch.bfloat16 and fast else torch.float32


def accepts(x, codes, scales, zeros, bias, bits, group_size):
    """Why the C++ kernel does not take these arguments, or None."""
    if x.dtype == torch.float64 or scales.dtype not in _SCALE_KINDS:
        return "The C++ kernel computes in fp32 with scales of 16 or 32 bits; fp64 runs the reference."
    return None


@functools.cache
def _bf16_kernel():
    """The product of bf16 rows by weights of four bits, or None where the CPU has no instructions for it."""
    if native.load_error("wna16_bf16") is not None or not native.load("wna16_bf16").wna16_bf16_built():
        return None
    function = native.load("wna16_bf16").wna16_bf16_linear
    function.argtypes = [_POINTER] * 6 + [_SIZE] * 5 + [_INT]
    function.restype = None
    return function


@functools.cache
def _few():
    """The product of few bf16 rows by weights of 4 or 8 bits, and what tells which groups it takes; None as above."""
    if _bf16_kernel() is None:
        return None
    library = native.load("wna16_bf16")
    function, takes = library.wna16_bf16_few, library.wna16_bf16_few_takes
    function.argtypes = [_POINTER] * 6 + [_SIZE] * 5 + [_INT] * 3
    function.restype = None
    takes.argtypes, takes.restype = [_INT, _SIZE, _SIZE], _INT
    return function, takes


@functools.cache
def pair_rows(bits: int, inputs: int, groups: int) -> int:
    """Up to how many rows of bf16 that product is the fastest; 0 where the CPU, or the groups, are not for it."""
    found = _few()
    if bits not in _PAIR_ROWS or found is None or not found[1](bits, inputs, groups):
        return 0
    return _PAIR_ROWS[bits]


def _few_bf16(x, codes, scales, zeros, bias, bits):
    """x [..., K] of bf16, few rows, by codes of 4 or 8 bits."""
    (outputs, words), inputs = codes.shape, x.shape[-1]
    x, bias = x.contiguous(), None if bias is None else bias.to(x.dtype).contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    _few()[0](
        x.data_ptr(), codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), x.numel() // inputs, outputs, inputs, 4 * words,
        scales.shape[1], bits, _SCALE_KINDS[scales.dtype], torch.get_num_threads() if outputs * inputs >= _MIN_WORK else 1,
    )  # fmt: skip
    return out


def _bf16(x, codes, scales, zeros, bias):
    """x [M, K] of bf16 by codes of four bits, in strips."""
    (outputs, words), (rows, inputs) = codes.shape, x.shape
    scales = scales.float()
    shifts = scales * (8.0 if zeros is None else zeros)
    x, bias = x.contiguous(), None if bias is None else bias.to(x.dtype).contiguous()
    out = x.new_empty(rows, outputs)
    _bf16_kernel()(
        x.data_ptr(), codes.data_ptr(), scales.data_ptr(), shifts.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(),
        rows, outputs, inputs, 4 * words, scales.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _many_rows(x, codes, scales, zeros, bias, bits):
    """x [M, K] for large M: a slab of weight rows is dequantised, multiplied, and dropped."""
    (outputs, words), inputs = codes.shape, x.shape[1]
    dense = _dense_dtype(x.dtype)
    x_dense = x.to(dense)
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    step = max(1, min(outputs, _SLAB // inputs))
    slab = torch.empty(step, inputs)
    for first in range(0, outputs, step):
        count = min(step, outputs - first)
        _dequantize()(
            codes.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            slab.data_ptr(),
            first,
            count,
            outputs,
            inputs,
            words,
            scales.shape[1],
            bits,
            _SCALE_KINDS[scales.dtype],
            torch.get_num_threads(),
        )
        part = None if bias is None else bias[first : first + count].to(dense)
        out[:, first : first + count] = torch.nn.functional.linear(x_dense, slab[:count].to(dense), part)
    return out


@defs.wna16_linear.provider(
    "cpu_cpp", device="cpu", supported=lambda: native.load_error("wna16"), supports_args=accepts
)
def run(x, codes, scales, zeros, bias, bits, group_size):
    """The operator in C++: few rows read the codes, many bf16 rows multiply strips of them widened in the cache."""
    outputs, words = codes.shape
    inputs = x.shape[-1]
    rows = x.numel() // inputs
    codes, scales = codes.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    if x.dtype == torch.bfloat16 and 0 < rows <= pair_rows(bits, inputs, scales.shape[1]):
        return _few_bf16(x, codes, scales, zeros, bias, bits)
    if rows > _FEW_BF16_ROWS and bits == 4 and x.dtype == torch.bfloat16 and _bf16_kernel() is not None:
        return _bf16(x.reshape(rows, inputs), codes, scales, zeros, bias).reshape(*x.shape[:-1], outputs)
    if rows > _FUSED_ROWS:
        out = _many_rows(x.reshape(rows, inputs), codes, scales, zeros, bias, bits)
        return out.reshape(*x.shape[:-1], outputs)
    wide = x.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out = torch.empty((*x.shape[:-1], outputs), dtype=torch.float32)
    _linear()(
        wide.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        outputs,
        inputs,
        words,
        scales.shape[1],
        bits,
        _SCALE_KINDS[scales.dtype],
        _PLANES[x.dtype],
        torch.get_num_threads() if outputs * inputs >= _MIN_WORK else 1,
    )
    return out.to(x.dtype)
