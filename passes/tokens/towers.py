"""Which tower a token pass prunes, and what its layers cost."""

from __future__ import annotations

from typing import Any

from thresher.report import Miss

from ..structure.recover import Structure, Tower


def largest_tower(structure: Structure) -> Tower | None:
    """The tower with the most weights in its layers: the language model of a vision-language model."""
    return max(structure.towers, key=tower_size, default=None)


def no_layers(structure: Structure) -> list[Miss]:
    """A Miss for a graph with attention in which no layers were recovered; none for one without attention."""
    if not (structure.attentions or structure.missed):
        return []
    why = f" The first thing not understood: {structure.missed[0].reason}" if structure.missed else ""
    return [Miss("the whole program", f"No layers on a residual stream were recovered in this graph.{why}")]


def tower_size(tower: Tower) -> int:
    """Weights in a tower's layers."""
    return sum(
        s.in_features * s.out_features for l in tower.layers for b in l.branches for s in b.site.linears
    )


def layer_flops(layer: Any, tokens: float, kept: float | None = None) -> tuple[float, float]:
    """(linears, attention) of one layer on `tokens` tokens, one multiply-add counting as two.

    Causal attention counts half of its square; `kept` tokens attend (default: all). Attention that was not recovered
    counts nothing.
    """
    site = layer.attention
    weights = sum(s.in_features * s.out_features for b in layer.branches for s in b.site.linears)
    attending = tokens if kept is None else kept
    width = site.heads * (site.head_dim + site.value_dim) if site is not None else 0
    return 2 * weights * tokens, attending * attending * width
