"""CPU providers of `kv_attention`.

`cpu_cpp` reads codes once and never turns them into keys or values: best for a few queries.
`cpu_sdpa` restores them first, which pays from about twenty queries on.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import arguments, native
from . import attention as defs
from .format import Pool, as_pools, dequantize

_FEW = 16
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Pool(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Pool._fields] + [
        (name, ctypes.c_int64) for name in ("slots", "blocks", "bits")
    ]


class _Tail(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "slot_stride")
    ]


def _tail(t: torch.Tensor) -> _Tail:
    return _Tail(t.data_ptr(), *t.stride()[:3])


def _refuse(q, *rest):
    if q.dtype not in _KINDS:
        return f"It reads {', '.join(map(str, _KINDS))}; q is {q.dtype}."
    if q.shape[2] > _FEW:
        return f"It is meant for up to {_FEW} queries; q holds {q.shape[2]}."
    return None


@defs.kv_attention.provider(
    "cpu_cpp", device="cpu", supported=lambda: native.load_error("kv_attention"), supports_args=_refuse
)
def _kv_attention_cpp(q, pools, k_tail, v_tail, visible, scale):
    found = as_pools(pools)
    found = [Pool(*(t.contiguous() for t in pool)) for pool in found if pool.slots]
    k_tail, v_tail = (t if t.stride(-1) == 1 else t.contiguous() for t in (k_tail, v_tail))
    batch, heads, queries, dim = q.shape
    asked = (q.float() * scale).contiguous()
    answer = torch.empty(batch, heads, queries, v_tail.shape[3])
    views = (_Pool * len(found))(
        *(_Pool(*(t.data_ptr() for t in pool), pool.slots, len(pool.ends), pool.bits) for pool in found)
    )
    seen = None if visible is None else visible.contiguous()
    sizes = (batch, heads, k_tail.shape[1], queries, dim, v_tail.shape[3])
    native.load("kv_attention").kv_attention(
        native.pointer(asked),
        views,
        ctypes.c_int64(len(found)),
        ctypes.byref(_tail(k_tail)),
        ctypes.byref(_tail(v_tail)),
        ctypes.c_int64(k_tail.shape[2]),
        _KINDS[q.dtype],
        None if seen is None else native.pointer(seen),
        native.pointer(answer),
        *(ctypes.c_int64(size) for size in sizes),
        torch.get_num_threads(),
    )
    return defs.empty_result(q, v_tail).copy_(answer)


@defs.kv_attention.provider("cpu_sdpa", device="cpu", supports_args=lambda *a: arguments.refuse_scale(a[-1]))
def _kv_attention_sdpa(q, pools, k_tail, v_tail, visible, scale):
    """For many queries at once: keys and values are restored, and a matrix product does the rest."""
    found = as_pools(pools)
    parts = [tuple(t.to(q.dtype) for t in dequantize(pool)) for pool in found if pool.slots]
    k, v = (torch.cat(side, dim=2) for side in zip(*parts, (k_tail, v_tail), strict=True))
    mask = defs.sees(q.shape[2], k.shape[2], visible, q.device)
    out = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    blind = ~mask.any(-1, keepdim=True)
    return defs.empty_result(q, v).copy_(out.masked_fill(blind, 0.0))
