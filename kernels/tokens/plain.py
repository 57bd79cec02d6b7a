"""The choice of tokens in plain ATen: ranks by stable sorts in place of keys made of bits."""

from __future__ import annotations

import torch
from torch import fx

from thresher.graph.nodes import argument
from thresher.plain_form import Plain, Spelling

from ..varlen.plain import segments


def rank(scores: torch.Tensor, protected: torch.Tensor | None, pad: torch.Tensor | None) -> torch.Tensor:
    """int64 keys like `tokens.select.rank_keys`, in the same order: the larger stays first.

    A stable sort gives each score its rank; the exporters' sort breaks ties by place as torch's does.
    """
    tokens = scores.shape[-1]
    scores = scores.float()
    scores = torch.where(scores.isnan(), -torch.inf, scores) + 0.0
    place = torch.arange(tokens, device=scores.device)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.zeros_like(order).scatter(-1, order, place.expand_as(order))
    key = tokens - 1 - ranks
    if protected is not None:
        key = torch.where(protected, tokens + place, key)
    return key if pad is None else torch.where(pad, -1 - place, key)


def _rising(index: torch.Tensor) -> torch.Tensor:
    return index.sort(dim=-1, stable=True).values


def _topk_sorted(scores, protected, pad, k, counts):
    index = rank(scores, protected, pad).topk(k, dim=1).indices
    if counts is None:
        return _rising(index)
    spare = torch.arange(k, device=scores.device) >= counts[:, None]
    index = _rising(torch.where(spare, scores.shape[1], index))
    return torch.where(index == scores.shape[1], -1, index)


def _topk_segments(scores, protected, cu_seqlens, counts, k):
    tokens = scores.shape[0]
    segment = segments(cu_seqlens, tokens)
    key = rank(scores[None], protected[None] if protected is not None else None, None)[0]
    # among its own segment, how many tokens rank above
    above = ((key[None] > key[:, None]) & (segment[None] == segment[:, None])).sum(1)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    ends = torch.minimum(counts.long(), lengths).cumsum(0).clamp_max(k)
    kept = torch.cat([ends.new_zeros(1), ends])
    chosen = above < (kept[1:] - kept[:-1])[segment]
    place = torch.arange(tokens, device=scores.device)
    index = torch.where(chosen, tokens - place, -place).topk(k).indices
    return index, kept.to(cu_seqlens.dtype)


def _adaptive_count(scores, protected, tau):
    order = rank(scores, protected, None).topk(scores.shape[1], dim=1).indices
    mass = scores.double().gather(1, order).cumsum(1)
    count = (mass < tau * mass[:, -1:]).sum(1) + 1
    if protected is not None:
        count = torch.maximum(count, protected.sum(1))
    return count.clamp(min=1).clamp(max=scores.shape[1])


def draw(spread: int, seed: int) -> torch.Tensor:
    """What `probe_positions` draws for a seed, fp64 [spread]."""
    return torch.rand(spread, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _probe_positions(starts, lengths, recent, spread, seed):
    return positions(starts, lengths, recent, draw(spread, seed))


def positions(starts, lengths, recent: int, drawn: torch.Tensor) -> torch.Tensor:
    """`probe_positions` with the draw at hand."""
    spread = drawn.shape[0]
    lengths = lengths.long()[..., None]
    earlier = (lengths - recent).clamp_min(0)
    low, high = ((torch.arange(spread) + i) * earlier // max(spread, 1) for i in (0, 1))
    rows = low + torch.minimum((drawn * (high - low)).long(), (high - low - 1).clamp_min(0))
    rows = torch.where(high > low, rows, -1)
    last = lengths - recent + torch.arange(recent)
    rows = torch.cat([rows, torch.where(last >= 0, last, -1)], dim=-1)
    return torch.where(rows >= 0, rows + starts.long()[..., None], -1).flatten(1)


def _spell_probe(spelling: Spelling, node: fx.Node) -> fx.Node:
    """Probe positions with their random draw, which depends on the seed alone, as a constant."""
    starts, lengths, recent, spread, seed = (
        argument(node, n) for n in ("starts", "lengths", "recent", "spread", "seed")
    )
    drawn = spelling.constant(f"probe_positions.draw.{spread}.{seed}", node, draw(spread, seed))
    return spelling.traced(node, positions, [starts, lengths, recent, drawn])


SORTED, SEGMENTS, COUNT = (Plain(run=f) for f in (_topk_sorted, _topk_segments, _adaptive_count))
PROBE = Plain(run=_probe_positions, spell=_spell_probe)
