"""CUDA provider of `kv_attention`, on the kernels of `kv_triton`."""

from __future__ import annotations

import torch

from ..tokens.cuda import supported
from . import attention as defs
from . import triton_kernels as kernels
from .format import as_pools

_WIDTHS = (64, 128, 256)  # at 2 bits a part of 64 channels is 16, the least a tile may be
_MOST_ROWS = 128
_SPAN = 128  # slots of the tail a program takes


def _refuse(q, pools, k_tail, v_tail, visible, scale) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"It reads float16, bfloat16 and float32, not {q.dtype}."
    if q.shape[3] not in _WIDTHS or v_tail.shape[3] not in _WIDTHS:
        return f"It takes head widths of 64, 128 and 256; these are {q.shape[3]} and {v_tail.shape[3]}."
    rows = q.shape[1] // k_tail.shape[1] * q.shape[2]
    if rows > _MOST_ROWS:
        return f"It is meant for up to {_MOST_ROWS} queries a key-value head; there are {rows}."
    if k_tail.stride(3) != 1 or v_tail.stride(3) != 1:
        return "The tail's channels are not stored densely."
    return None if q.numel() else "There are no queries."


def launch(q, pools, k_tail, v_tail, visible, scale):
    """`kv_attention` on the tensors' own device."""
    import triton

    batch, heads, queries, dim = q.shape
    kv_heads, tail, dim_v = v_tail.shape[1:]
    found = [pool for pool in as_pools(pools) if pool.slots]
    rows = heads // kv_heads * queries
    padded = max(16, triton.next_power_of_2(rows))
    asked = q.new_zeros((batch * kv_heads, padded, dim))
    asked[:, :rows] = q.reshape(batch * kv_heads, rows, dim)
    spans = triton.cdiv(tail, _SPAN)
    parts = sum(len(pool.ends) for pool in found) + spans
    shape = (batch * kv_heads, parts, padded)
    peaks, masses, sums = (q.new_empty(size, dtype=torch.float32) for size in (shape, shape, (*shape, dim_v)))
    masked = visible is not None
    seen = visible.contiguous().view(torch.uint8) if masked else asked  # never read
    row = visible.shape[1] if masked else 0
    left = (peaks, masses, sums)
    tile = dict(MASKED=masked, R=padded, D=dim, DV=dim_v, BN=32, PRECISION="ieee")
    slot = part = 0
    for pool in found:
        blocks = len(pool.ends)
        kernels.pool_part[(blocks, batch * kv_heads)](
            asked, *(t.contiguous() for t in pool), seen, *left,
            kv_heads, pool.slots, blocks, row, slot, part, parts, scale, BITS=pool.bits, **tile,
        )  # fmt: skip
        slot, part = slot + pool.slots, part + blocks
    kernels.tail_part[(spans, batch * kv_heads)](
        asked, k_tail, v_tail, seen, *left, kv_heads, queries, tail, row, slot,
        *k_tail.stride()[:3], *v_tail.stride()[:3], part, parts, _SPAN, scale, **tile,
    )  # fmt: skip
    answer = q.new_empty((batch * kv_heads, padded, dim_v), dtype=torch.float32)
    kernels.merge[(rows, batch * kv_heads)](
        *left,
        answer,
        parts,
        R=padded,
        DV=dim_v,
        num_warps=1,  # a row is short: 16 bytes of it for each thread
    )
    answer = answer[:, :rows].reshape(batch, heads, queries, dim_v)
    return defs.empty_result(q, v_tail).copy_(answer)


@defs.kv_attention.provider("cuda_triton", device="cuda", supported=supported, supports_args=_refuse)
def _kv_attention_cuda(q, pools, k_tail, v_tail, visible, scale):
    with torch.cuda.device(q.device):
        return launch(q, pools, k_tail, v_tail, visible, scale)
