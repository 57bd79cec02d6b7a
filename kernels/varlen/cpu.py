"""CPU providers of packed attention: C++ over all segments at once, else PyTorch's own, one by one.

The C++ kernel computes in fp32. It makes one call of a whole batch, where a call per segment costs more
than the attention of a short one. Half types go through it as fp32 on CPUs that multiply tiles of bf16
no faster, those without AMX: 1.0 to 1.9 times PyTorch's attention, and closer to the exact result.

For the rest there is PyTorch's attention: each call sees one segment only, so nothing outside it can
reach its result, and no mask is ever larger than one segment's. Segments under a window or a soft cap
are cut further into blocks of queries against the keys those can see, so cost and memory follow the
visible pairs.

Equal segments are not batched into one call: for half types PyTorch chooses its blocking by the
batch size, so a segment's bits would depend on its neighbours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import arguments, native
from . import attention as defs

_MIN_BLOCK = 128  # queries; smaller blocks spend their time in calls
_MAX_SCORES = 1 << 22  # of one block, over all heads: 16 MiB in fp32


def _takes(q, k, v, *rest) -> str | None:
    if q.dtype == torch.float32:
        return None
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"The kernel computes in float32; the queries are {q.dtype}."
    if "amx_bf16" in native.cpu_features():
        return f"The kernel computes in float32, and this CPU multiplies {q.dtype} faster, in tiles."
    return None


def _native_supported() -> str | None:
    return native.load_error("varlen_attention")


@defs.varlen_attention.provider("cpu_cpp", device="cpu", supported=_native_supported, supports_args=_takes)
def _varlen_cpp(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap):
    return _run_cpp(q, k, v, cu_seqlens, scale, causal, window_left, softcap)


@defs.varlen_attention_masked.provider(
    "cpu_cpp", device="cpu", supported=_native_supported, supports_args=_takes
)
def _varlen_masked_cpp(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
    return _run_cpp(q, k, v, cu_seqlens, scale, False, -1, 0.0, mask, rows, cols)


def _run_cpp(q, k, v, cu_seqlens, scale, causal, window, softcap, mask=None, rows=None, cols=None):
    given_dtype = q.dtype
    q, k, v = (t.float() if t.stride(3) == 1 else t.float().contiguous() for t in (q, k, v))
    cu_seqlens, out = cu_seqlens.contiguous(), defs.empty_result(q, v)
    sizes = (cu_seqlens.shape[0] - 1, q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    strides = [stride for t in (q, k, v, out) for stride in t.stride()[1:3]]
    given: tuple[Any, ...] = (None, None, None)
    if mask is not None:
        strides += [0 if mask.shape[d] == 1 and d < 2 else mask.stride(d) for d in range(4)]
        rows, cols = rows.long().contiguous(), cols.long().contiguous()
        given = tuple(native.pointer(t) for t in (mask, rows, cols))
    failed = native.load("varlen_attention").thresher_varlen_attention(
        *(native.pointer(t) for t in (q, k, v, out, cu_seqlens)),
        (ctypes.c_int64 * 5)(*sizes),
        (ctypes.c_int64 * 12)(*strides),
        ctypes.c_float(scale),
        int(causal),
        ctypes.c_int64(window),
        ctypes.c_float(softcap),
        0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        *given,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("varlen_attention: no memory for the packed keys and values of the longest segment")
    return out.to(given_dtype)


def _blocks(length: int, block: int, causal: bool, window: int) -> Iterator[tuple[int, int, int, int]]:
    """(first query, end, first key, end) for blocks of queries and the keys any of them sees."""
    for first in range(0, length, block):
        last = min(first + block, length)
        low = 0 if window < 0 else max(0, first - window)
        high = last if causal else length if window < 0 else min(length, last + window)
        yield first, last, low, high


def _band(queries: int, keys: int, offset: int, causal: bool, window: int) -> torch.Tensor:
    """bool [queries, keys]: which keys each query sees when query 0 stands at key `offset`."""
    distance = torch.arange(offset, offset + queries)[:, None] - torch.arange(keys)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window < 0 else seen & (distance.abs() <= window)


def _scaled(q, k, v, cu_seqlens, max_len, scale, *rest) -> str | None:
    return arguments.refuse_scale(scale)


@defs.varlen_attention.provider("cpu_sdpa", device="cpu", supports_args=_scaled)
def _varlen_cpu(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap):
    out = defs.empty_result(q, v)
    grouped = q.shape[1] != k.shape[1]
    bands: dict[tuple[int, int, int], torch.Tensor] = {}
    for begin, end in defs.segments(defs.bounds(cu_seqlens, q.shape[2])):
        length = end - begin
        q_s, k_s, v_s, out_s = (
            q[:, :, begin:end],
            k[:, :, begin:end],
            v[:, :, begin:end],
            out[:, :, begin:end],
        )
        windowed = 0 <= window_left < length - 1
        if not windowed and softcap == 0:
            out_s.copy_(
                scaled_dot_product_attention(q_s, k_s, v_s, is_causal=causal, scale=scale, enable_gqa=grouped)
            )
            continue
        window = window_left if windowed else -1
        block = max(_MIN_BLOCK, window) if windowed else length
        if softcap > 0:
            block = max(1, min(block, _MAX_SCORES // (q.shape[1] * length)))
        for q0, q1, k0, k1 in _blocks(length, block, causal, window):
            shape = (q1 - q0, k1 - k0, q0 - k0)
            if shape not in bands:
                bands[shape] = _band(*shape, causal, window)
            parts = (q_s[:, :, q0:q1], k_s[:, :, k0:k1], v_s[:, :, k0:k1])
            if softcap > 0:
                part = defs.attend(*parts, scale, softcap, bands[shape])
            else:
                part = scaled_dot_product_attention(
                    *parts, attn_mask=bands[shape], scale=scale, enable_gqa=grouped
                )
            out_s[:, :, q0:q1] = part
    return out


def _slice_mask(mask: torch.Tensor, row: int, cols: torch.Tensor) -> torch.Tensor:
    """The mask of one segment, [1, heads, length, length]; a view where its columns are contiguous."""
    whole = mask[row : row + 1] if mask.shape[0] > 1 else mask
    first, last = int(cols[0]), int(cols[-1])
    if last - first == cols.shape[0] - 1:
        return whole[:, :, first : last + 1, first : last + 1]
    return whole.index_select(2, cols).index_select(3, cols)


@defs.varlen_attention_masked.provider(
    "cpu_sdpa", device="cpu", supports_args=lambda *a: arguments.refuse_scale(a[-1])
)
def _varlen_masked_cpu(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    out = defs.empty_result(q, v)
    grouped = q.shape[1] != k.shape[1]
    for begin, end in defs.segments(defs.bounds(cu_seqlens, q.shape[2])):
        row, v_s, out_s = int(rows[begin]), v[:, :, begin:end], out[:, :, begin:end]
        if row < 0:
            out_s.copy_(v_s.repeat_interleave(q.shape[1] // v.shape[1], dim=1))
            continue
        cut = _slice_mask(mask, row, cols[begin:end])
        cut = cut if cut.dtype == torch.bool else cut.to(q.dtype)
        out_s.copy_(
            scaled_dot_product_attention(
                q[:, :, begin:end], k[:, :, begin:end], v_s, attn_mask=cut, scale=scale, enable_gqa=grouped
            )
        )
    return out
