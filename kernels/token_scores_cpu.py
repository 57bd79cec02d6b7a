"""CPU provider of `probe_scores`: a cache-sized stripe of the attention map at a time.

PyTorch's matrix product, softmax and column sum run over a stripe of rows small enough to stay in
the second-level cache, cut at the last key any of its rows sees.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import token_scores as defs

_STRIPE = 1 << 18  # scores: 1 MiB in fp32


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
    defs.check_probes(q, k, probes, segments)
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
