"""CUDA providers of token scoring, on the kernels of `token_triton`."""

from __future__ import annotations

import torch

from .. import optional_triton
from . import scores
from . import transition as transitions
from . import triton_kernels as kernels

_KINDS = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST_HEAD = 256


def supported() -> str | None:
    """Why this machine cannot run the kernels, or None."""
    return optional_triton.MISSING or (None if torch.cuda.is_available() else "PyTorch sees no CUDA GPU.")


def _refuse_scores(q, k, probes, segments, scale) -> str | None:
    if q.dtype not in _KINDS or k.dtype != q.dtype:
        return f"It reads float16, bfloat16 and float32, q and k alike; these are {q.dtype} and {k.dtype}."
    if q.shape[3] > _WIDEST_HEAD or q.stride(3) != 1 or k.stride(3) != 1:
        return f"It takes head widths up to {_WIDEST_HEAD}, stored densely; head_dim is {q.shape[3]}."
    return None if q.numel() and k.numel() else "There are no tokens."


def launch_scores(q, k, probes, segments, scale):
    """`probe_scores` on the tensors' own device."""
    import triton

    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    sums, seen = scores._fake_scores(q, k, probes, segments, scale)
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    probes = probes.int().contiguous()
    segmented = segments is not None
    segments = segments.int().contiguous() if segmented else probes  # never read
    sizes = (heads, heads // k.shape[1], rows, keys, dim, scale, *q.stride()[:3], *k.stride()[:3])
    tile = dict(
        SEGMENTED=segmented,
        BP=16 if rows <= 16 else 32,
        BN=128 if 64 < dim <= 128 and q.dtype != torch.float32 else 64,  # 64 keys of half heads of 128 spill
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        PRECISION="ieee",  # TF32 would move scores by 1e-3
        num_warps=8,  # with four, head widths of 128 spill
    )
    kernels.row_lse[(triton.cdiv(rows, tile["BP"]), batch * heads)](
        q, k, probes, segments, lse, *sizes, **tile
    )
    kernels.key_sums[(triton.cdiv(keys, tile["BN"]), batch)](
        q, k, probes, segments, lse, sums, seen, *sizes, **tile
    )
    return sums, seen


@scores.probe_scores.provider("cuda_triton", device="cuda", supported=supported, supports_args=_refuse_scores)
def _probe_scores_cuda(q, k, probes, segments, scale):
    with torch.cuda.device(q.device):
        return launch_scores(q, k, probes, segments, scale)


def _refuse_transition(x, fx) -> str | None:
    if x.dtype not in _KINDS:
        return f"It reads float16, bfloat16 and float32, not {x.dtype}."
    return None if x.numel() else "There are no tokens."


def launch_transition(x, fx):
    """`token_transition` on the tensors' own device."""
    import triton

    x, fx = x.contiguous(), fx.contiguous()
    magnitude, cosine = transitions._fake_pair(x, fx)
    block = min(2048, triton.next_power_of_2(x.shape[-1]))
    kernels.transition[(magnitude.numel(),)](x, fx, magnitude, cosine, x.shape[-1], BLOCK=block)
    return magnitude, cosine


@transitions.token_transition.provider(
    "cuda_triton", device="cuda", supported=supported, supports_args=_refuse_transition
)
def _token_transition_cuda(x, fx):
    with torch.cuda.device(x.device):
        return launch_transition(x, fx)
