"""CUDA providers of the low-bit linear, in Triton.

triton_gemv   at most 4 rows, compute capability 8.0 and above
triton_gemm   any number of rows, fp16 and bf16
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import optional_triton
from . import linear as defs
from . import triton_kernels as wna16_triton

GEMV_ROWS = 4


def gemv_tile() -> dict[str, int]:
    """Tile and launch options of the GEMV."""
    return {"BN": 8, "BK": 256, "num_warps": 4}


def gemm_tile(rows: int) -> dict[str, int]:
    """Tile and launch options of the GEMM for that many activation rows; chosen by what compiles without spills."""
    options = {"GROUP": 8, "num_stages": 3}
    if rows <= 16:
        return {"BM": 16, "BN": 64, "BK": 64, "num_warps": 4, **options}
    if rows <= 64:
        return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, **options}
    return {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, **options}


def launch(x, codes, scales, zeros, bias, bits: int, group_size: int, *, gemv: bool) -> torch.Tensor:
    """Launch a kernel: `x` [M, K] with unit inner stride; returns [M, N] in x's dtype."""
    (m, k), (n, words) = x.shape, codes.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    groups = scales.shape[1]
    size = group_size if group_size > 0 else max(32, -(-k // 32) * 32)
    shape = (words, groups, size, x.stride(0), n)
    flags = {"BITS": bits, "ZEROS": zeros is not None, "HAS_BIAS": bias is not None}
    tensors = (x, codes, scales, y if zeros is None else zeros, y if bias is None else bias, y)
    if gemv:
        tile = gemv_tile()
        wna16_triton.gemv[(-(-n // tile["BN"]), m)](*tensors, n, k, *shape, **flags, **tile)
    else:
        tile = gemm_tile(m)
        wna16_triton.gemm[(-(-m // tile["BM"]) * -(-n // tile["BN"]),)](
            *tensors, m, n, k, *shape, **flags, **tile
        )
    return y


def _supported() -> str | None:
    if optional_triton.MISSING:
        return optional_triton.MISSING
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "The low-bit kernel needs an NVIDIA GPU, and torch sees none."
    found = torch.cuda.get_device_capability()
    return (
        None if found >= (8, 0) else f"It needs compute capability 8.0; this GPU has {found[0]}.{found[1]}."
    )


def _rows(x: torch.Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _gemv_accepts(x, *rest):
    if x.dtype == torch.float64:
        return "It accumulates in fp32; fp64 runs the reference."
    return None if _rows(x) <= GEMV_ROWS else f"It is for at most {GEMV_ROWS} rows; this call has {_rows(x)}."


def _gemm_accepts(x, *rest):
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"The tensor cores would round {x.dtype} activations; it takes fp16 and bf16."
    return None


def _provider(gemv: bool) -> Callable[..., torch.Tensor]:
    def run(x, codes, scales, zeros, bias, bits, group_size):
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        zeros = None if zeros is None else zeros.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = launch(rows, codes.contiguous(), scales.contiguous(), zeros, bias, bits, group_size, gemv=gemv)
        return y.view(*x.shape[:-1], codes.shape[0])

    return run


_add = defs.wna16_linear.provider
_add("triton_gemv", device="cuda", supported=_supported, supports_args=_gemv_accepts)(_provider(True))
_add("triton_gemm", device="cuda", supported=_supported, supports_args=_gemm_accepts)(_provider(False))
