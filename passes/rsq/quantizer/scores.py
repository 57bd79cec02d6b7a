"""Where the importance of tokens comes from in a recovered layer (the strategies are in importance.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.graph.program import Program

from ...structure.recover import AttentionSite, LayerSite
from ..config import RSQConfig
from . import importance

aten = torch.ops.aten
Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Scorer:
    """How a layer's tokens are scored. targets: nodes whose values it reads. site: for AttnCon."""

    strategy: str
    targets: tuple[fx.Node, ...]
    site: AttentionSite | None = None


def scorer(program: Program, layer: LayerSite | None, config: RSQConfig) -> Scorer | None:
    """The scorer of a layer, or None where its tokens cannot be told apart (all count alike)."""
    if layer is None or config.importance == "uniform":
        return None
    strategy = config.importance
    if strategy == "attncon":
        site = layer.attention
        if site is None or site.past is not None:
            return None
        if site.probabilities is not None:
            return Scorer(strategy, (site.probabilities,), site)
        operands = tuple(a for a in site.node.args[:2] if isinstance(a, fx.Node))
        known = site.visibility.kind in ("causal", "bidirectional")
        if site.node.target is not aten.scaled_dot_product_attention.default or len(operands) != 2:
            return None
        if not known:
            operands += tuple(a for a in (site.node.args[3:4]) if isinstance(a, fx.Node))
        return Scorer(strategy, operands, site)
    if strategy == "actdiff":
        return Scorer(strategy, (layer.input, layer.output))
    return Scorer(strategy, (layer.input,))


def weigh(
    found: Scorer | None, values: Values, batch: Any, counts: torch.Tensor | None, config: RSQConfig
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(raw scores at real tokens, flat; weights [batch, length]) of one batch; (None, None) for all alike."""
    if found is None:
        return None, None
    scores = _scores(found, values, batch, counts)
    if scores is None:
        return None, None
    real = batch.real
    if not config.sink:
        # The first real token takes most of the attention; left in, it squeezes all others together.
        keep = torch.ones_like(scores, dtype=torch.bool) if real is None else real
        first = keep & (keep.long().cumsum(1) == 1)
        alone = keep.sum(1, keepdim=True) == 1
        weights = importance.weights(
            scores, config.r_min, config.r_max, (keep & ~first) | (keep & alone), config.power
        )
        weights = torch.where(first, torch.ones_like(weights), weights)
    else:
        weights = importance.weights(scores, config.r_min, config.r_max, real, config.power)
    return (scores.flatten() if real is None else scores[real]), weights


def _scores(found: Scorer, values: Values, batch: Any, counts: torch.Tensor | None) -> torch.Tensor | None:
    real = batch.real
    if found.strategy == "attncon":
        assert found.site is not None
        return _attention(found.site, found.targets, values, real)
    x = values[found.targets[0]]
    if x.dim() != 3:
        return None
    everyone = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
    if found.strategy == "tokenfreq":
        return (
            None if batch.tokens is None or counts is None else importance.token_rarity(batch.tokens, counts)
        )
    if found.strategy == "first":
        return importance.chunks(everyone, 8, (0,))
    if found.strategy == "first_last":
        return importance.chunks(everyone, 32, (0, 31))
    if found.strategy == "actnorm":
        return importance.activation_norm(x)
    if found.strategy == "tokensim":
        return importance.token_distance(x, real)
    return importance.activation_change(x, values[found.targets[1]])


def _attention(
    site: AttentionSite, targets: Sequence[fx.Node], values: Values, real: torch.Tensor | None
) -> torch.Tensor:
    """[batch, length]: the attention that each key receives."""
    if site.probabilities is not None:
        received = values[site.probabilities].float()  # [batch, heads, queries, keys]
        if real is not None:
            received = received * real[:, None, :, None]
        return received.sum((1, 2))
    q, k = values[targets[0]], values[targets[1]]
    if len(targets) > 2:
        return importance.masked_concentration(q, k, values[targets[2]], site.operator_scale, real)
    window = site.visibility.window
    return importance.attention_concentration(
        q, k, site.operator_scale, site.visibility.kind == "causal", window, site.softcap or 0.0, real
    )


def rows_of(
    x: torch.Tensor, weights: torch.Tensor | None, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [..., K] and the weight of each of its rows; pads get 0, and rows that are no tokens count alike."""
    weights = real.float() if weights is None and real is not None else weights
    if weights is None or weights.shape == x.shape[:-1]:
        return x, weights
    if x.dim() == 2 and x.shape[0] == weights.numel():  # flattened tokens
        return x, weights.flatten()
    return x, None


def token_counts(tokens: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """How often each id occurs in the calibration set."""
    given = [t.flatten() for t in tokens if t is not None]
    return torch.bincount(torch.cat(given)) if given else None
