"""CUDA providers of packed attention: PyTorch's FlashAttention where it serves, else our Triton kernel."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from .. import arguments, optional_triton
from . import attention as defs
from . import triton_kernels as kernels

_HALF = (torch.float16, torch.bfloat16)
_WIDEST_HEAD = 256


@functools.cache
def _torch_varlen_options() -> frozenset[str]:
    """The keywords of this PyTorch's `varlen_attn`, which differ by version; empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_supported() -> str | None:
    if not {"scale", "window_size"} <= _torch_varlen_options():
        return "torch.nn.attention.varlen.varlen_attn with scale and window_size needs PyTorch 2.11."
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU."
    if torch.version.hip is not None:
        return "varlen_attn is used on NVIDIA GPUs only; on ROCm its results are not checked."
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"FlashAttention needs compute capability 8.0; this GPU has {major}.{minor}."
    return None


def _torch_supports_args(
    q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None
) -> str | None:
    if q.dtype not in _HALF:
        return f"FlashAttention takes float16 and bfloat16, not {q.dtype}."
    if softcap > 0:
        return "varlen_attn has no soft cap."
    if sinks is not None:
        return "varlen_attn has no sinks."
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > _WIDEST_HEAD:
        return f"Head widths {q.shape[3]} and {v.shape[3]} are not one multiple of 8 up to {_WIDEST_HEAD}."
    if q.shape[2] == 0:
        return "There are no tokens."
    return arguments.refuse_scale(scale)


def _batch_invariant() -> dict[str, int]:
    """Keywords that keep a segment's bits free of its neighbours.

    FlashAttention 2 never splits the keys here and some versions refuse the option; later ones,
    which a user can switch on for the process, choose a split by the longest segment.
    """
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return {"num_splits": 1} if active is not None and "num_splits" in _torch_varlen_options() else {}


@defs.varlen_attention.provider(
    "torch_varlen", device="cuda", supported=_torch_supported, supports_args=_torch_supports_args
)
def _varlen_torch(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None):
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (_unit_stride(t[0].transpose(0, 1)) for t in (q, k, v))  # [T, heads, width]
    options: dict[str, Any] = dict(_batch_invariant())
    if q.shape[1] != k.shape[1] and "enable_gqa" in _torch_varlen_options():
        options["enable_gqa"] = True
    window = (window_left, 0 if causal else window_left)
    result = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, scale=scale, window_size=window, **options
    )
    assert isinstance(result, torch.Tensor)  # a pair only where the log-sum-exp is asked for
    return result.unsqueeze(0).transpose(1, 2)


@dataclass(frozen=True)
class Tiling:
    """Queries and keys per block, warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiling(width: int, dtype: torch.dtype, masked: bool, capability: int) -> Tiling:
    """How to cut the work. By head width, dtype and GPU (its compute capability times ten): by length, a result would
    depend on neighbours.

    Chosen so that nothing spills and a block fits into the 99 KiB of shared memory of the smallest
    targets (compute capability 8.6 and 12.0). A mask tile takes registers of its own.
    """
    wide = _block(width)
    if dtype in _HALF:
        if wide <= 64:
            return Tiling(128, 32 if masked else 64, 8, 2 if 100 <= capability < 120 else 3)
        if wide == 128:
            return Tiling(64 if masked else 128, 32, 8, 2)
        return Tiling(64, 16 if masked else 32, 8, 2)
    if wide <= 128:
        return Tiling(32, 32, 4, 2) if wide <= 64 else Tiling(16, 32, 4, 2)
    return Tiling(16, 16, 8, 1)  # the one exception: 16 bytes a thread are spilled


def _triton_supported() -> str | None:
    if optional_triton.MISSING is not None:
        return optional_triton.MISSING
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA GPU."


def _kernel_takes(q: torch.Tensor, v: torch.Tensor) -> str | None:
    if q.dtype not in (*_HALF, torch.float32):
        return f"The kernel takes float16, bfloat16 and float32, not {q.dtype}."
    if max(q.shape[3], v.shape[3]) > _WIDEST_HEAD:
        return f"The kernel takes heads up to {_WIDEST_HEAD} wide."
    return None


def _triton_supports_args(q, k, v, *rest) -> str | None:
    return _kernel_takes(q, v)


@defs.varlen_attention.provider(
    "triton", device="cuda", supported=_triton_supported, supports_args=_triton_supports_args
)
def _varlen_triton(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None):
    return launch(
        q, k, v, cu_seqlens, max_len, scale, causal=causal, window=window_left, softcap=softcap, sinks=sinks
    )


@defs.varlen_attention_masked.provider(
    "triton", device="cuda", supported=_triton_supported, supports_args=_triton_supports_args
)
def _varlen_masked_triton(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    return launch(q, k, v, cu_seqlens, max_len, scale, mask=mask, rows=rows, cols=cols)


def launch(
    q,
    k,
    v,
    cu_seqlens,
    max_len,
    scale,
    *,
    causal=False,
    window=-1,
    softcap=0.0,
    mask=None,
    rows=None,
    cols=None,
    sinks=None,
) -> torch.Tensor:
    """Run the Triton kernel on the tensors' device; arguments as of the two operators."""
    out = defs.empty_result(q, v)
    segments = cu_seqlens.shape[0] - 1
    if out.numel() == 0 or segments == 0:
        return out
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    cut = tiling(max(q.shape[3], v.shape[3]), q.dtype, mask is not None, 10 * major + minor)
    if mask is None:
        kind, strides = kernels.NO_MASK, [0, 0, 0, 0]
        mask = rows = cols = cu_seqlens  # never read
    else:
        kind = kernels.BOOL_MASK if mask.dtype == torch.bool else kernels.FLOAT_MASK
        strides = [0 if mask.shape[d] == 1 and d < 2 else mask.stride(d) for d in range(4)]
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    lone = sinks is not None
    sinks = sinks.float().contiguous() if lone else q  # q is never read as sinks
    # Three TF32 products give fp32 its accuracy back, on tensor cores.
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    grid = (-(-max_len // cut.queries), q.shape[1], segments)
    kernels.varlen_forward[grid](
        q, k, v, out, cu_seqlens, mask, rows, cols, sinks,
        q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
        out.stride(1), out.stride(2), *strides, scale, softcap, window,
        GROUP=q.shape[1] // k.shape[1],
        D=q.shape[3], DV=v.shape[3],
        BLOCK_D=_block(q.shape[3]), BLOCK_DV=_block(v.shape[3]),
        CAUSAL=causal, WINDOWED=window >= 0, SOFTCAP=softcap > 0, MASK=kind, SINKS=lone,
        BM=cut.queries, BN=cut.keys,
        PRECISION=precision,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def _block(width: int) -> int:
    """The power of two, at least 16, that holds a head's width: what a tensor-core product takes."""
    return 1 << max(width - 1, 15).bit_length()


def _unit_stride(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
