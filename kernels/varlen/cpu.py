"""CPU providers of packed attention: C++ over all segments at once, else PyTorch's own, one by one.

The C++ kernels make one call of a whole batch, where a call per segment costs more than the attention of a short one.
bf16 is multiplied in pairs where the CPU has AVX512-BF16, with weights rounded to bf16 as PyTorch's attention does; fp32,
and half types on other CPUs, in fp32. With AMX PyTorch's attention multiplies tiles of bf16, which pays for long segments:
there the two are timed once a machine, by the length of segments.

For the rest there is PyTorch's attention: each call sees one segment only, so nothing outside it can
reach its result, and no mask is ever larger than one segment's. Segments under a window or a soft cap
are cut further into blocks of queries against the keys those can see, so cost and memory follow the
visible pairs.

Equal segments are not batched into one call: for half types PyTorch chooses its blocking by the
batch size, so a segment's bits would depend on its neighbours.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import arguments, native
from ..sparse import tune as sparse_tune
from . import attention as defs

_TIMED = (16, 64, 256, 1024)  # tokens of a segment at which tiles are timed
_MIN_BLOCK = 128  # queries; smaller blocks spend their time in calls
_MAX_SCORES = 1 << 22  # of one block, over all heads: 16 MiB in fp32


def _takes(q, k, v, *rest) -> str | None:
    if q.dtype == torch.float32:
        return None
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"The kernel computes in float32; the queries are {q.dtype}."
    if "amx_bf16" in native.cpu_features():
        cu_seqlens = rest[3] if isinstance(rest[1], torch.Tensor) else rest[0]  # behind a mask, or at once
        mean = q.shape[2] // max(1, cu_seqlens.shape[0] - 1)
        length = next((n for n in _TIMED if mean <= n), _TIMED[-1])
        if gain_over_tiles(length, q.shape[3], q.dtype) < 1:
            return (
                f"This CPU multiplies {q.dtype} in tiles, measured to be faster at {length} tokens a segment."
            )
    return None


@functools.lru_cache(maxsize=256)
def gain_over_tiles(length: int, width: int, dtype: torch.dtype) -> float:
    """How many times the speed of PyTorch's attention the C++ kernel has on eight segments of so many tokens, four heads
    wide; measured once a machine."""
    built = Path(native.load("varlen_bf16")._name).stem
    shape = [length, width, str(dtype), torch.get_num_threads()]

    def measure() -> float:
        q = torch.ones(1, 4, 8 * length, width, dtype=dtype)
        ends = torch.arange(0, 8 * length + 1, length, dtype=torch.int32)
        given = (q, q, q, ends, length, width**-0.5, False, -1, 0.0)
        theirs, ours = sparse_tune.least_seconds(
            (lambda turn: _varlen_cpu(*given), lambda turn: _varlen_cpp(*given))
        )
        return theirs / ours

    key = json.dumps(["varlen", built, torch.__version__, *shape])
    return sparse_tune.remembered(key, measure)


@functools.cache
def multiplies_pairs() -> bool:
    """Whether the kernel for bf16 was built with the instructions it is for."""
    return (
        native.load_error("varlen_bf16") is None
        and native.load("varlen_bf16").thresher_varlen_bf16_products() == 1
    )


def _native_supported() -> str | None:
    return native.load_error("varlen_attention")


@defs.varlen_attention.provider("cpu_cpp", device="cpu", supported=_native_supported, supports_args=_takes)
def _varlen_cpp(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None):
    return _run_cpp(q, k, v, cu_seqlens, scale, causal, window_left, softcap, sinks=sinks)


@defs.varlen_attention_masked.provider(
    "cpu_cpp", device="cpu", supported=_native_supported, supports_args=_takes
)
def _varlen_masked_cpp(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
    return _run_cpp(q, k, v, cu_seqlens, scale, False, -1, 0.0, mask, rows, cols)


def _run_cpp(
    q, k, v, cu_seqlens, scale, causal, window, softcap, mask=None, rows=None, cols=None, sinks=None
):
    given_dtype, name, function = q.dtype, "varlen_attention", "thresher_varlen_attention"
    if q.dtype == torch.bfloat16 and multiplies_pairs():
        name, function = "varlen_bf16", "thresher_varlen_bf16"
    else:
        q, k, v = (t.float() for t in (q, k, v))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    cu_seqlens, out = cu_seqlens.contiguous(), defs.empty_result(q, v)
    sizes = (cu_seqlens.shape[0] - 1, q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    strides = [stride for t in (q, k, v, out) for stride in t.stride()[1:3]]
    given: tuple[Any, ...] = (None, None, None)
    if mask is not None:
        strides += [0 if mask.shape[d] == 1 and d < 2 else mask.stride(d) for d in range(4)]
        rows, cols = rows.long().contiguous(), cols.long().contiguous()
        given = tuple(native.pointer(t) for t in (mask, rows, cols))
    sinks = None if sinks is None else sinks.float().contiguous()
    failed = getattr(native.load(name), function)(
        *(native.pointer(t) for t in (q, k, v, out, cu_seqlens)),
        (ctypes.c_int64 * 5)(*sizes),
        (ctypes.c_int64 * 12)(*strides),
        ctypes.c_float(scale),
        int(causal),
        ctypes.c_int64(window),
        ctypes.c_float(softcap),
        0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        *given,
        None if sinks is None else native.pointer(sinks),
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


def _scaled(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None) -> str | None:
    if sinks is not None:
        return "PyTorch's attention has no sinks."
    return arguments.refuse_scale(scale)


@defs.varlen_attention.provider("cpu_sdpa", device="cpu", supports_args=_scaled)
def _varlen_cpu(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None):
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
