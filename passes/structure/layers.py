"""Makes layers of the branches on a residual stream: their names, their ends, and all that crosses these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program

from .pattern import uncast
from .sites import common_prefix
from .stream import Norms
from .tower import Branch, LayerSite

aten = torch.ops.aten


def build_layers(tower: Sequence[Sequence[Branch]], norms: Norms) -> list[LayerSite]:
    """Layers with their hidden states; each layer's output is the node the next one reads."""
    starts = [_read_by(layer[0]) for layer in tower]
    last = tower[-1][-1]
    if last.stream_norm is not None:
        end = last.stream_norm.output
    else:
        after = norms.by_input.get(last.add, [])
        end = after[0].input if len(after) == 1 else _restored(last.add, starts[0])
    layers = []
    for index, layer in enumerate(tower):
        ends = [linear.fqn for b in layer for linear in (b.site.linears[0], b.site.linears[-1])]
        fqn = _layer_name(common_prefix(ends))
        layers.append(LayerSite(index, fqn, starts[index], (*starts[1:], end)[index], list(layer)))
    return layers


def _read_by(branch: Branch) -> fx.Node:
    return uncast(branch.pre_norm.input if branch.pre_norm is not None else branch.stream)


def _restored(add: fx.Node, like: fx.Node) -> fx.Node:
    """The addition's result in the shape of the layers' inputs."""
    rank = value(like).dim()
    for user in add.users:
        if value(add).dim() != rank and user.target is aten.reshape.default and value(user).dim() == rank:
            return user
    return add


def _layer_name(fqn: str) -> str:
    """`encoder.block.0` from `encoder.block.0.layer`: up to the last number."""
    parts = fqn.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else fqn


_LAYOUT = {
    aten.unsqueeze.default, aten.expand.default, aten.transpose.int, aten.to.dtype,
    aten.repeat_interleave.self_int,
}  # fmt: skip


def bound(layers: Sequence[LayerSite], program: Program) -> None:
    """Fill in each layer's nodes, what it takes from outside, and what of it is read outside."""
    order = list(program.graph.nodes)
    position = {node: i for i, node in enumerate(order)}
    constant: set[fx.Node] = set()  # functions of weights alone
    for node in order:
        sources = node.all_input_nodes
        if (
            sources
            and node.op == "call_function"
            and all(a.op == "get_attr" or a in constant for a in sources)
        ):
            constant.add(node)

    def owned(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [a for n in nodes for a in n.all_input_nodes if a.target in _LAYOUT or a in constant]

    for layer in layers:
        inside = _between(layer.input, layer.output, position)
        near = owned(inside)
        while near:  # what only this layer reads: masks and tables laid out for its heads, weights plus one
            node = near.pop()
            if node not in inside and node is not layer.input and all(u in inside for u in node.users):
                inside.add(node)
                near += owned([node])
        layer.nodes = sorted(inside, key=position.__getitem__)
        outside = [
            n
            for n in _arguments(layer.nodes)
            if n not in inside and n.op != "get_attr" and n is not layer.input
        ]
        layer.inputs = [layer.input, *sorted(dict.fromkeys(outside), key=position.__getitem__)]
        layer.exports = [
            n for n in layer.nodes if n is not layer.output and any(u not in inside for u in n.users)
        ]


def _arguments(nodes: Any) -> list[fx.Node]:
    return [a for node in nodes for a in node.all_input_nodes]


def _between(start: fx.Node, end: fx.Node, position: dict[fx.Node, int]) -> set[fx.Node]:
    """Nodes on a way from `start` to `end`, without `start`."""
    first = position[start]
    needed, stack = set(), [end]
    while stack:
        node = stack.pop()
        if node not in needed and position[node] > first:
            needed.add(node)
            stack += node.all_input_nodes
    inside: set[fx.Node] = set()
    for node in sorted(needed, key=position.__getitem__):
        if any(a is start or a in inside for a in node.all_input_nodes):
            inside.add(node)
    return inside
