"""The C++ kernels of NVFP4, as functions on CPU tensors.

`linear` reads weights in the interchange layout: there is no repacked copy to build, to keep or to go
stale. Few rows run in a kernel that multiplies straight from the codes; many rows decode a slab of weights
at a time. bf16 activations have kernels of their own on CPUs with AVX512-BF16 (nvfp4_bf16.cpp); anything
else of many rows, unrounded, uses the fp32 matrix multiplication that PyTorch has.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from thresher.formats.nvfp4 import BLOCK, pad_blocks

from .. import native

MODE_NUMBERS = {"thresher": 0, "te": 1, "torchao": 2, "modelopt": 3, "compressed_tensors": 4}
TYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLANES = {"exact": 0, "int8": 1, "int16": 2}
"""Byte planes that carry the activations in the C++ kernel; 0 is fp32."""
GEMV_ROWS = 16
FEW_BF16_ROWS = 10
"""Up to so many rows of bf16 are multiplied straight from the codes; more, strip by strip of decoded weights."""
INTEGER_ROWS = {"exact": 0, "int8": 8, "int16": 1}
"""Beyond so many rows of bf16, keeping activations unrounded is faster where the CPU multiplies bf16."""
_SLAB_BYTES = 4 << 20  # a decoded slab stays in the L2 or L3 cache until it is multiplied


def _i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def unavailable() -> str | None:
    """Why the C++ kernels cannot run on this machine, or None."""
    return native.load_error("nvfp4_linear") or native.load_error("nvfp4_quantize")


def accepts(x: torch.Tensor) -> bool:
    """Whether `amax` and `quantize` can take this tensor, on this machine."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in TYPE_NUMBERS
        and native.load_error("nvfp4_quantize") is None
    )


def amax(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, fp32 []; not finite when an element is not."""
    x = x.detach().contiguous()
    call = native.load("nvfp4_quantize").nvfp4_amax
    call.restype = ctypes.c_float
    threads = torch.get_num_threads()
    return torch.tensor(call(native.pointer(x), _i64(x.numel()), TYPE_NUMBERS[x.dtype], threads))


def quantize(x: torch.Tensor, g: float, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of finite `x` [..., K] for the mode's tensor scale `g`."""
    x = x.detach().contiguous()
    k = x.shape[-1]
    rows, blocks = (x.numel() // k if k else 0), -(-k // BLOCK)
    codes = torch.empty(*x.shape[:-1], blocks * 8, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], blocks, dtype=torch.float8_e4m3fn)
    native.load("nvfp4_quantize").nvfp4_quantize(
        native.pointer(x),
        _i64(rows),
        _i64(k),
        ctypes.c_float(g),
        MODE_NUMBERS[mode],
        TYPE_NUMBERS[x.dtype],
        native.pointer(codes),
        native.pointer(scales),
        torch.get_num_threads(),
    )
    return codes, scales


def fake_quantize(x: torch.Tensor, g: float, back: float, tiled: bool, seed: int) -> torch.Tensor:
    """fp32 [R, K]: finite `x` rounded to NVFP4 and back, mode "thresher", for the tensor scale `g` = 1 / `back`.

    tiled: one scale a 16 x 16 tile. seed: 0 rounds to nearest, any other stochastically.
    """
    x = x.detach().float().contiguous()
    out = torch.empty_like(x)
    native.load("nvfp4_quantize").nvfp4_round(
        native.pointer(x),
        _i64(x.shape[0]),
        _i64(x.shape[1]),
        ctypes.c_float(g),
        ctypes.c_float(back),
        int(tiled),
        ctypes.c_uint64(seed),
        native.pointer(out),
        torch.get_num_threads(),
    )
    return out


def dequantize(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` [N, 16 * B] fp32 filled with code * block scale, which is exact."""
    native.load("nvfp4_quantize").nvfp4_dequantize(
        native.pointer(codes),
        native.pointer(scales),
        native.pointer(out),
        _i64(codes.shape[0]),
        _i64(scales.shape[1]),
        torch.get_num_threads(),
    )
    return out


@torch.no_grad()
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str,
) -> torch.Tensor:
    """`alpha` * x [M, K] W^T + `bias`, W from codes [N, 8B] and scales [N, B]: [M, N] in x's dtype.

    alpha: fp32, one value, the tensor scale; activations: a key of PLANES.
    """
    if x.dtype == torch.bfloat16 and bf16_kernel() and x.shape[0] > INTEGER_ROWS[activations]:
        return _bf16(x, codes, scales, alpha, bias)
    if activations == "exact" and x.shape[0] > GEMV_ROWS:
        y = _many_rows(x, codes, scales).mul_(alpha)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    y = x.new_empty(x.shape[0], codes.shape[0])
    native.load("nvfp4_linear").nvfp4_linear(
        native.pointer(x),
        native.pointer(codes),
        native.pointer(scales),
        native.pointer(alpha),
        None if bias is None else native.pointer(bias),
        native.pointer(y),
        TYPE_NUMBERS[x.dtype],
        _i64(x.shape[0]),
        _i64(codes.shape[0]),
        _i64(x.shape[1]),
        _i64(scales.shape[1]),
        PLANES[activations],
        torch.get_num_threads(),
    )
    return y


@functools.cache
def bf16_kernel() -> bool:
    """Whether the kernel for bf16 activations was built with the instructions it is for."""
    return native.load_error("nvfp4_bf16") is None and bool(native.load("nvfp4_bf16").nvfp4_bf16_built())


def _bf16(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(x.shape[0], codes.shape[0])
    native.load("nvfp4_bf16").nvfp4_bf16_linear(
        native.pointer(x),
        native.pointer(codes),
        native.pointer(scales),
        native.pointer(alpha),
        None if bias is None else native.pointer(bias),
        native.pointer(y),
        _i64(x.shape[0]),
        _i64(codes.shape[0]),
        _i64(x.shape[1]),
        _i64(scales.shape[1]),
        int(x.shape[0] <= FEW_BF16_ROWS),
        torch.get_num_threads(),
    )
    return y


def _many_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the decoded weights, fp32 [M, N] without the tensor scale."""
    n, k = codes.shape[0], scales.shape[1] * BLOCK
    rows = pad_blocks(x).float()
    out = torch.empty(x.shape[0], n)
    step = max(1, min(n, _SLAB_BYTES // max(1, 4 * k)))
    slab = torch.empty(step, k)
    for first in range(0, n, step):
        last = min(n, first + step)
        weights = dequantize(codes[first:last], scales[first:last], slab[: last - first])
        torch.mm(rows, weights.t(), out=out[:, first:last])
    return out
