"""Which features of a linear end up where, found by replaying its views on a tensor without data.

A view changes sizes, strides and offset only. Replayed on a meta tensor they tell, for every head and
every dimension of a query, which of the linear's features it is; and a wiring in which heads and
tokens are mixed up cannot be replayed at all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value

from .pattern import is_cast

aten = torch.ops.aten

VIEWS = {
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.select.int, aten.slice.Tensor, aten.flatten.using_ints, aten.unflatten.int, aten.t.default,
    aten.contiguous.default, aten.clone.default,
}  # fmt: skip
PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
_RESHAPES = {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
_COPIES = {aten.contiguous.default, aten.clone.default}


def sizes(node: Any) -> list[int]:
    """A tensor node's sizes as numbers, symbolic ones by their example. Raises Unviewable without one."""
    return [_number(s, node) for s in value(node).shape]


def _number(size: Any, node: Any) -> int:
    if isinstance(size, torch.SymInt):
        if not size.node.has_hint():
            raise Unviewable(f"{node} has a size that only the data decide")
        return int(size.node.hint)
    return size


class Unviewable(Exception):
    """The views move features across tokens or rows; the text is half a sentence about the node."""


def is_view(node: Any) -> bool:
    """Whether a node gives another view of its first argument, or one part of a split, with the same values."""
    if not isinstance(node, fx.Node):
        return False
    target: Any = node.target
    return target in VIEWS or (target is operator.getitem and node.args[0].target in PARTS)  # type: ignore[operator, union-attr]


def viewed(node: fx.Node) -> fx.Node:
    """What a view is taken of; for one part of a split, the tensor that is split."""
    source = node.args[0]
    return source.args[0] if node.target is operator.getitem else source  # type: ignore[union-attr, return-value]


def behind_views(node: Any) -> Any:
    """The value before reshapes and casts that keep every element (not before slices)."""
    while isinstance(node, fx.Node) and (node.target in _RESHAPES or node.target in _COPIES or is_cast(node)):
        node = node.args[0]
    return node


def replay(start: torch.Tensor, steps: Sequence[fx.Node]) -> torch.Tensor:
    """Apply the steps' views to a meta tensor. Steps that are not views keep the shape. Raises Unviewable."""
    tensor = start
    for node in steps:
        if node.target is operator.getitem:
            split: fx.Node = node.args[0]  # type: ignore[assignment]
            parts = split.target(tensor, *_numbers(split.args[1:]), **_numbers(dict(split.kwargs)))  # type: ignore[operator]
            tensor = parts[node.args[1]]  # type: ignore[index]
        elif node.target in _RESHAPES:
            try:
                tensor = tensor.view(sizes(node))
            except RuntimeError:
                raise Unviewable(f"{node.name} merges dimensions that do not lie side by side") from None
        elif node.target in VIEWS and node.target not in _COPIES:
            tensor = node.target(tensor, *_numbers(node.args[1:]), **_numbers(dict(node.kwargs)))  # type: ignore[operator]
        elif list(tensor.shape) != sizes(node):
            raise Unviewable(f"{node.name} changes the shape")
    return tensor


def head_rows(output: fx.Node, features: int, steps: Sequence[fx.Node]) -> torch.Tensor:
    """Features [heads, dim] of a linear's output that its views lay out as [batch, heads, tokens, dim]."""
    result = replay(_like(output), steps)
    if result.dim() != 4:
        raise Unviewable(f"{steps[-1].name if steps else output.name} has {result.dim()} dimensions, not 4")
    batch, heads, tokens, width = result.shape
    _, by_head, by_token, by_dim = result.stride()
    if tokens > 1 and by_token % features:
        raise Unviewable("its dimension 2 runs over features, where tokens are expected")
    offset = int(result.storage_offset())
    rows = offset + torch.arange(heads)[:, None] * by_head + torch.arange(width) * by_dim
    if int(rows.max()) >= features:
        raise Unviewable("its dimension 1 runs over tokens, where heads are expected")
    if batch * tokens != prod(sizes(output)[:-1]):
        raise Unviewable("it holds some of the tokens only, or features in their place")
    return rows


def feature_rows(output: fx.Node, features: int, steps: Sequence[fx.Node]) -> torch.Tensor:
    """Features [width] of a linear's output that its views bring to a last dimension."""
    result = replay(_like(output), steps)
    rows = int(result.storage_offset()) + torch.arange(result.shape[-1]) * result.stride(-1)
    if int(rows.max()) >= features:
        raise Unviewable("its last dimension runs over tokens, where features are expected")
    if prod(result.shape[:-1]) != prod(sizes(output)[:-1]):
        raise Unviewable("it holds some of the tokens only, or features in their place")
    return rows


def merges_heads(attention: fx.Node, steps: Sequence[fx.Node]) -> bool:
    """Whether views of [batch, heads, tokens, dim] end with the last dimension [heads * dim], in order."""
    batch, heads, tokens, width = sizes(attention)
    start = torch.empty(batch, tokens, heads, width, device="meta").transpose(1, 2)
    try:
        result = replay(start, steps)
    except Unviewable:
        return False
    return result.shape[-1] == heads * width and result.stride(-1) == 1


def _like(node: fx.Node) -> torch.Tensor:
    return torch.empty(sizes(node), device="meta")


def _numbers(arguments: Any) -> Any:
    def number(argument: Any) -> Any:
        return (
            _number(value(argument), argument) if isinstance(argument, (fx.Node, torch.SymInt)) else argument
        )

    if isinstance(arguments, dict):
        return {k: number(v) for k, v in arguments.items()}
    return [[number(i) for i in a] if isinstance(a, (list, tuple)) else number(a) for a in arguments]
