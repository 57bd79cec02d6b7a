"""CPU providers of `probe_scores`, which keep a cache-sized stripe of the attention map at a time.

`cpu_cpp` fuses products, softmax and column sums. `cpu_stripes` says the same in PyTorch's operators, for
machines without a compiler and for fp64; its stripes too are cut at the last key any of their rows sees.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from .. import native
from . import scores as defs

_STRIPE = 1 << 18  # scores: 1 MiB in fp32


def _refuse(q, *rest):
    return "It computes in fp32; q is float64." if q.dtype == torch.float64 else None


@defs.probe_scores.provider(
    "cpu_cpp",
    device="cpu",
    supported=lambda: native.load_error("probe_scores"),
    supports_args=_refuse,
)
def _probe_scores_cpp(q, k, probes, segments, scale):
    batch, heads, rows, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    q, k = q.float().contiguous(), k.float()
    k = k if k.stride(-1) == 1 else k.contiguous()
    columns = probes.long().contiguous()
    own = None if segments is None else segments.int().contiguous()
    sums, seen = q.new_empty((batch, keys)), q.new_empty((batch, keys), dtype=torch.int32)
    native.load("probe_scores").probe_scores(
        native.pointer(q),
        native.pointer(k),
        (ctypes.c_int64 * 3)(*k.stride()[:3]),
        native.pointer(columns),
        None if own is None else native.pointer(own),
        ctypes.c_float(scale),
        native.pointer(sums),
        native.pointer(seen),
        *(ctypes.c_int64(size) for size in (batch, heads, kv_heads, rows, keys, width)),
        torch.get_num_threads(),
    )
    return sums, seen


def _stripes(columns: torch.Tensor, segments: torch.Tensor | None, step: int) -> Iterator[tuple[int, int]]:
    """(first row, end) of stripes of at most `step` rows, each within one sequence.

    A stripe across two sequences would let one's NaN into the other's softmax.
    """
    owners = torch.zeros_like(columns) if segments is None else segments[0].gather(0, columns)
    end = 0
    for rows in owners.unique_consecutive(return_counts=True)[1].tolist():
        begin, end = end, end + rows
        for first in range(begin, end, step):
            yield first, min(first + step, end)


@defs.probe_scores.provider("cpu_stripes", device="cpu")
def _probe_scores_cpu(q, k, probes, segments, scale):
    batch, heads, _, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = q.new_zeros((batch, keys), dtype=wide)
    seen = torch.zeros((batch, keys), dtype=torch.int32)
    step = max(1, _STRIPE // max(1, keys * group))
    for b in range(batch):
        own = None if segments is None else segments[b : b + 1]
        # Rows that see nothing drop out here, so that softmax below never meets an empty row.
        columns = probes[b].long()
        alive = columns >= 0
        if own is not None:
            alive &= own[0].gather(0, columns.clamp_min(0)) >= 0
        order = columns.masked_fill(~alive, keys).argsort()[: int(alive.sum())]
        columns = columns[order]
        for first, last in _stripes(columns, own, step):
            stripe = columns[first:last]
            begin, end = 0, int(stripe[-1]) + 1
            mask = defs.seen_by(stripe[None], end, None if own is None else own[:, :end])[0]
            if own is not None:
                begin = int(mask[-1].int().argmax())
                mask = mask[:, begin:]
            seen[b, begin:end] += mask.sum(0, dtype=torch.int32)
            hidden = ~mask.repeat(group, 1)
            picked = q[b, :, order[first:last]].to(wide) * scale  # [Hq, rows, D]
            for h in range(kv_heads):
                scores = picked[h * group : (h + 1) * group].reshape(-1, dim) @ k[b, h, begin:end].to(wide).T
                scores.masked_fill_(hidden, -torch.inf)
                sums[b, begin:end] += scores.softmax(1).sum(0)
    return sums.div_(heads), seen
