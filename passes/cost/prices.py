"""What each operator costs by its own rule: see `CostModel.node`, which has one for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from thresher import site_counts
from thresher.graph.nodes import value

from .model import CHEAP_SHARE, WIDTH, dtype_of, price

if TYPE_CHECKING:
    from .model import CostModel


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An operator's argument by its name in the schema."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, known in enumerate(target._schema.arguments):
        if known.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, known.default_value if default is None else default)
    return default


@price("scaled_dot_product_attention")
def _sdpa(model: CostModel, node: fx.Node) -> float:
    q, k, v = node.args[:3]
    queries, keys = model.size(value(q).shape[-2]), model.size(value(k).shape[-2])
    width = model.size(value(q).shape[-1])
    heads = model.numel(q) / max(queries * width, 1)
    flops = 4 * heads * queries * keys * width
    if _argument(node, "is_causal", False):
        flops /= 2
    moved = WIDTH.get(dtype_of(node), 4) * sum(model.numel(t) for t in (q, k, v, node))
    return model.attention(flops, keys, width, dtype_of(node), moved, packed=False)


def _varlen(model: CostModel, node: fx.Node, causal: bool) -> float:
    q, k, v = node.args[:3]
    heads, width = (model.size(value(q).shape[i]) for i in (1, 3))
    lengths = model.lengths or [model.size(value(q).shape[2])]
    squares = sum(l * l for l in lengths)
    flops = 4 * heads * width * squares / (2 if causal else 1)
    moved = WIDTH.get(dtype_of(node), 4) * sum(model.numel(t) for t in (q, k, v, node))
    mean = squares / max(sum(lengths), 1)
    return model.attention(flops, mean, width, dtype_of(node), moved, packed=True)


@price("varlen_attention")
def _varlen_attention(model: CostModel, node: fx.Node) -> float:
    return _varlen(model, node, bool(_argument(node, "causal")))


@price("varlen_attention_masked")
def _varlen_masked(model: CostModel, node: fx.Node) -> float:
    return _varlen(model, node, False)


@price("kv_attention")
def _kv_attention(model: CostModel, node: fx.Node) -> float:
    """A few queries over a cache: the share of its slots that the mask shows, where the rows' lengths are known."""
    q, tail = node.args[0], node.args[2]
    rows, heads, queries, width = (model.size(s) for s in value(q).shape)
    slots = model.size(value(tail).shape[2])
    seen = sum(model.lengths) / max(rows, 1) if model.lengths and len(model.lengths) == rows else slots
    seen = min(seen, slots)
    flops = 4 * rows * heads * queries * seen * width
    moved = 2 * WIDTH.get(dtype_of(q), 4) * model.numel(tail) * seen / max(slots, 1)
    return model.attention(flops, seen, width, dtype_of(q), moved, packed=False)


@price("index_copy")
def _index_copy(model: CostModel, node: fx.Node) -> float:
    """What is written, where that is the new value of an input: a static cache stays where it lies and takes one token."""
    moved = node.args[3] if node in model.updates else node
    return CHEAP_SHARE * model.numel(moved) / model.device.pointwise


@price("nvfp4_linear")
def _nvfp4(model: CostModel, node: fx.Node) -> float:
    x = node.args[0]
    inputs = model.size(value(x).shape[-1])
    weights = inputs * model.size(value(node).shape[-1])
    mode = _argument(node, "activations", "exact")
    dtype = "nvfp4" if mode == "nvfp4" and "nvfp4" in model.device.flops else dtype_of(x)
    rows = model.numel(x) / max(inputs, 1)
    return model.linear(rows, weights, dtype, f"nvfp4_linear.{mode}", bits=4.5)


@price("wna16_linear")
def _wna16(model: CostModel, node: fx.Node) -> float:
    x, scales = node.args[0], node.args[2]
    bits = _argument(node, "bits")
    inputs = model.size(value(x).shape[-1])
    weights = inputs * model.size(value(node).shape[-1])
    stored = bits + 32 * model.numel(scales) / max(weights, 1)
    return model.linear(
        model.numel(x) / max(inputs, 1), weights, dtype_of(x), f"wna16_linear.{bits}", bits=stored
    )


def _density(node: fx.Node) -> float:
    """The share of neurons that were on at this site in the calls so far; all of them when nothing was counted."""
    known = site_counts.site(str(_argument(node, "site", ""))).union_density
    return 1.0 if known is None else known


@price("sparse_down")
def _sparse_down(model: CostModel, node: fx.Node) -> float:
    act, weight = node.args[:2]
    return _sparse(model, node, model.numel(act) / model.size(value(act).shape[-1]), model.numel(weight))


@price("sparse_mlp")
def _sparse_mlp(model: CostModel, node: fx.Node) -> float:
    gate = node.args[0]
    weights = model.numel(_argument(node, "up_weight")) + model.numel(_argument(node, "weight"))
    return _sparse(model, node, model.numel(gate) / model.size(value(gate).shape[-1]), weights)


def _sparse(model: CostModel, node: fx.Node, rows: float, weights: float) -> float:
    """Reads the active neurons' share of the weights; dense when there are too many tokens for that."""
    share = _density(node) if rows <= _argument(node, "bmax") else 1.0
    return model.linear(rows, weights * max(min(share + 0.02, 1.0), 1e-3), dtype_of(node))
