"""What operators of PyTorch cost by rules of their own; Thresher's bring theirs (`thresher.ops.define`), and
`CostModel.node` has one for all others."""

from __future__ import annotations

from torch import fx

from thresher.graph.nodes import argument, value
from thresher.pricing import dtype_of, width_of

from .model import CHEAP_SHARE, CostModel, price


@price("scaled_dot_product_attention")
def _sdpa(model: CostModel, node: fx.Node) -> float:
    q, k, v = node.args[:3]
    queries, keys = model.size(value(q).shape[-2]), model.size(value(k).shape[-2])
    width = model.size(value(q).shape[-1])
    heads = model.numel(q) / max(queries * width, 1)
    flops = 4 * heads * queries * keys * width
    if argument(node, "is_causal", False):
        flops /= 2
    moved = width_of(node) * sum(model.numel(t) for t in (q, k, v, node))
    return model.attention(flops, keys, width, dtype_of(node), moved, packed=False)


@price("index_copy")
def _index_copy(model: CostModel, node: fx.Node) -> float:
    """What is written, where that is the new value of an input: a static cache stays where it lies and takes one token."""
    moved = node.args[3] if node in model.updates else node
    return CHEAP_SHARE * model.numel(moved) / model.device.pointwise
