"""Take the tokens a caller reads before the LM head, not after it.

    matched:  select / slice / index along the sequence of `head(x)`, read by nothing else
    becomes:  `head` of the same selection of x

`model(...).logits[:, -1]` multiplies every position by the vocabulary and keeps one in S. A linear, and
what follows it elementwise (a soft cap, a cast), treats positions alike, so selecting first is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.graph.edit import call_before, replace
from thresher.graph.nodes import value
from thresher.graph.program import Program

aten = torch.ops.aten
_SELECTS = (aten.select.int, aten.slice.Tensor, aten.index.Tensor)
_ALIKE = {aten.linear.default, aten.to.dtype, aten._to_copy.default, aten.tanh.default, aten.mul.Tensor, aten.div.Tensor,
          aten.mul.Scalar, aten.div.Scalar, aten.neg.default}  # fmt: skip


def gather_early(program: Program) -> int:
    """Move selections in front of what they can pass; returns how many linears got shorter."""
    moved, dead = 0, set[fx.Node]()  # what is replaced stays in the graph, unread, until it is cleaned
    for node in program.nodes(*_SELECTS):
        while (source := _passable(node, dead)) is not None:
            moved += source.target is aten.linear.default
            dead |= {node, source}
            node = _swap(program, node, source)
    return moved


def _passable(node: fx.Node, dead: set[fx.Node]) -> fx.Node | None:
    """The operator before a selection of positions, when the two can change places."""
    source: Any = node.args[0]
    if not isinstance(source, fx.Node) or value(source) is None or source.target not in _ALIKE:
        return None
    if set(source.users) - dead != {node} or value(source).dim() != 3 or not _of_positions(node):
        return None
    others = [a for a in source.args[1:] if isinstance(a, fx.Node)]
    if source.target is not aten.linear.default and others:
        return None
    if not isinstance(source.args[0], fx.Node) or value(source.args[0]).dim() != 3:
        return None
    return source


def _of_positions(node: fx.Node) -> bool:
    """Whether it selects by row and column of [batch, sequence, features] and leaves the features alone."""
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        return len(indices) == 2 and all(i is not None for i in indices)
    return node.args[1] in (1, -2)


def _swap(program: Program, node: fx.Node, source: fx.Node) -> fx.Node:
    select: Any = node.target
    alike: Any = source.target
    first = call_before(node, select, (source.args[0], *node.args[1:]), node.kwargs)
    replace(node, call_before(node, alike, (first, *source.args[1:]), source.kwargs, like=source))
    return first
