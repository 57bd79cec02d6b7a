"""Packed attention in plain ATen: one attention of all packed tokens, under a mask that keeps sequences apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import argument, value
from thresher.plain_form import Plain, Spelling

SAYS = "Attention under a mask of all packed tokens: memory grows with the square of the packed tokens."


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(softcap(q k^T * scale) + mask) v in at least fp32; a query that sees nothing gives zeros.

    mask: bool (true = visible) or float (added), broadcastable to [1, Hq, queries, keys].
    sinks: [Hq], a score beside the keys' that has no value.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = (q.to(wide) * scale) @ k.transpose(-1, -2)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if sinks is not None:
        column = sinks.to(wide).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return (torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v).to(q.dtype)
    weights = torch.softmax(scores, dim=-1)
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return (weights.masked_fill(blind, 0.0) @ v).to(q.dtype)


def segments(cu_seqlens: torch.Tensor, tokens: Any) -> torch.Tensor:
    """int64 [T]: the number of the segment each packed token lies in."""
    place = torch.arange(tokens, device=cu_seqlens.device)
    return (place[:, None] >= cu_seqlens[None, 1:]).sum(1)


def visible(
    segment: torch.Tensor, positions: torch.Tensor, causal: bool, window: int, dtype: torch.dtype | None
) -> torch.Tensor:
    """The mask of packed attention [1, 1, T, T]: bool, or added to the scores when a dtype is given.

    positions: int64 [T], what causality and the window count in.
    """
    seen = segment[:, None] == segment[None]
    distance = positions[:, None] - positions[None]
    if causal:
        seen = seen & (distance >= 0)
    if window >= 0:
        seen = seen & (distance.abs() <= window)
    return as_mask(seen[None, None], dtype)


def masked(mask, rows, cols, cu_seqlens, dtype: torch.dtype | None) -> torch.Tensor:
    """The mask of `varlen_attention_masked`, [1, H or 1, T, T]: each token's entries at its real coordinates."""
    segment = segments(cu_seqlens, rows.shape[0])
    same = (segment[:, None] == segment[None])[None, None]
    filler = (rows < 0)[None, None]
    itself = same & torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    row = rows.clamp_min(0) if mask.shape[0] != 1 else torch.zeros_like(rows)
    taken = mask.permute(0, 2, 1, 3)[row.long(), cols.long()]  # [T, H, S]
    taken = taken.index_select(2, cols.long()).transpose(0, 1)[None]
    if mask.dtype == torch.bool:
        lone = filler[..., None]
        return as_mask((lone & itself) | (~lone & taken & same), dtype)
    outside = torch.full_like(taken, -torch.inf)
    kept = torch.where(filler[..., None], torch.where(itself, torch.zeros_like(taken), outside), taken)
    return torch.where(same, kept, outside)


def as_mask(seen: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`seen` (bool, True where a query sees a key) itself for dtype None; else 0 and -inf in that dtype, same shape."""
    if dtype is None:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def attend_packed(
    q, k, v, mask, scale: float, softcap: float = 0.0, blind: bool = False, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention under a packed mask. blind: some query may see nothing, and gives zeros."""
    if softcap > 0 or sinks is not None:
        return attend(q, k, v, scale, softcap, mask, sinks)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if not blind:
        return out
    nothing = (~mask if mask.dtype == torch.bool else mask == -torch.inf).all(-1, keepdim=True)
    return out.masked_fill(nothing, 0.0)


def _varlen_attention(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None):
    segment = segments(cu_seqlens, q.shape[2])
    place = torch.arange(q.shape[2], device=q.device)
    seen = visible(segment, place, causal, window_left, None)
    return attend_packed(q, k, v, seen, scale, softcap, False, sinks)


def _varlen_attention_masked(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    return attend_packed(q, k, v, masked(mask, rows, cols, cu_seqlens, None), scale, blind=True)


def _added(spelling: Spelling, node: fx.Node) -> torch.dtype | None:
    """The dtype in which masks are added to the scores; None where they are bool."""
    return value(node.args[0]).dtype if spelling.added_masks else None


def _spell(spelling: Spelling, node: fx.Node) -> fx.Node:
    """One `varlen_attention`; its mask is made once for all layers that see the same."""
    q, k, v, cu_seqlens = node.args[:4]
    scale, causal, window, softcap, sinks = (
        argument(node, n) for n in ("scale", "causal", "window_left", "softcap", "sinks")
    )
    segment = spelling.once(
        ("segments", cu_seqlens), node, lambda c, t: segments(c, t.shape[2]), [cu_seqlens, q]
    )
    dtype = _added(spelling, node)

    def mask(s: Any, columns: Any) -> Any:
        place = torch.arange(s.shape[0], device=s.device) if columns is None else columns
        return visible(s, place, causal, window, dtype)

    columns = spelling.columns if window >= 0 else None
    seen = spelling.once(("visible", cu_seqlens, causal, window, dtype), node, mask, [segment, columns])
    return spelling.traced(node, attend_packed, [q, k, v, seen, scale, softcap, False, sinks])


def _spell_masked(spelling: Spelling, node: fx.Node) -> fx.Node:
    """One `varlen_attention_masked`; its mask is made once for all layers that use it."""
    q, k, v, mask, rows, cols, cu_seqlens, _, scale = node.args
    dtype = _added(spelling, node)
    arguments = [mask, rows, cols, cu_seqlens, dtype]
    seen = spelling.once(("masked", *arguments), node, masked, arguments)
    return spelling.traced(node, attend_packed, [q, k, v, seen, scale, 0.0, True])


def _columns(node: fx.Node) -> Any:
    """The packed tokens, where a window counts distances in padded columns."""
    return value(node.args[0]).shape[2] if argument(node, "window_left") >= 0 else None


PLAIN = Plain(run=_varlen_attention, spell=_spell, says=SAYS, columns=_columns)
PLAIN_MASKED = Plain(
    run=_varlen_attention_masked, spell=_spell_masked, says=f"{SAYS} The mask is the batch's own."
)
