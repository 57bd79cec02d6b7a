"""How a node calls scaled_dot_product_attention, and what stands in for minus infinity in masks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from thresher.graph.nodes import argument

MASKED = -1e4  # an additive mask at or below this hides a key; models write the dtype's minimum or -inf


@dataclass(frozen=True)
class Attention:
    """The arguments of one attention node, by name."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float | None
    softcap: float = 0.0
    inside: frozenset[fx.Node] = frozenset()  # the nodes between q, k, v, mask and node, when spelled out
    sinks: fx.Node | None = None  # [heads], a stored score of each that has no value


def attention(node: fx.Node) -> Attention:
    """Read a scaled_dot_product_attention node; both spellings transformers uses give the same fields."""
    query, key, values, mask = (argument(node, n) for n in ("query", "key", "value", "attn_mask"))
    return Attention(node, query, key, values, mask if isinstance(mask, fx.Node) else None,
                     bool(argument(node, "is_causal")), argument(node, "scale"))  # fmt: skip
