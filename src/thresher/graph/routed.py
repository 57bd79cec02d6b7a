"""A mixture's experts said row by row: what is sorted by expert, multiplied in groups and sorted back is not sorted.

    order = argsort(experts); y = grouped_product(x[order], W, ends); y[inverse(order)]
    bmm(W[experts], x[:, :, None])
                                              both become   thresher::expert_linear(x, W, experts)

The rows stay where their tokens are, so tokens can be followed through a mixture, and products by a stored matrix for
each expert are one operator for every pass. The operator sorts by itself. What is not wholly understood stays as it is.
"""

from __future__ import annotations

import heapq
import operator
from typing import Any

import torch
from torch import fx

from .edit import call_before, replace
from .nodes import argument, sequence_of, value
from .program import Program
from .sizes import same_shape, same_size

aten = torch.ops.aten
_SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
_FRESH = {aten.empty_like.default, aten.zeros_like.default, aten.new_empty.default, aten.new_zeros.default}
_FOLLOW = {
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.cat.default, operator.getitem, aten.layer_norm.default,
    aten.rms_norm.default, aten.mean.dim, aten.sum.dim_IntList, aten.softmax.int, aten.glu.default,
    aten.to.dtype, aten._to_copy.default, aten.where.self, aten.masked_fill.Scalar,
}  # fmt: skip


def unroute(program: Program) -> None:
    """Say a program's routed products row by row, in place; what is left over is dead code."""
    if not hasattr(torch.ops.thresher, "expert_linear"):
        return  # the operators are not loaded
    grouped = any(is_grouped(n) for n in program.nodes())
    for node in program.nodes(aten.bmm.default):
        _gathered(program, node)
    for node in program.nodes(*_SORTS) if grouped else ():
        known = value(node.args[0])
        if known.dim() == 1 and not known.is_floating_point() and not argument(node, "descending"):
            _Sorted(program, node).undo()


def is_grouped(node: fx.Node) -> bool:
    """Whether a node multiplies groups of rows [R, K] by [E, K, N], given where each group ends."""
    name = str(node.target)
    return name in ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def _gathered(program: Program, node: fx.Node) -> None:
    """A batched product of rows and of the matrices gathered for them."""
    for place, matrices in enumerate(node.args[:2]):
        if (
            not isinstance(matrices, fx.Node)
            or matrices.target is not aten.index.Tensor
            or len(node.users) != 1
        ):
            continue
        table, places = matrices.args[0], sequence_of(matrices.args[1])
        other, user = node.args[1 - place], next(iter(node.users))
        vector = -1 if place == 0 else 1
        fits = (
            isinstance(other, fx.Node)
            and other.target is aten.unsqueeze.default
            and user.target in (aten.squeeze.dim, aten.squeeze.dims)
            and _dim(other.args[1], 3) == vector % 3
            and [_dim(d, 3) for d in sequence_of(user.args[1]) or [user.args[1]]] == [vector % 3]
        )
        if not fits or value(table).dim() != 3 or len(places) != 1 or value(places[0]).dim() != 1:
            continue
        if value(places[0]).dtype == torch.bool:
            continue
        x: Any = other.args[0]  # type: ignore[union-attr]
        weight = table if place == 0 else program.insert(user, aten.transpose.int, table, 1, 2)
        made = program.insert(user, torch.ops.thresher.expert_linear.default, x, weight, places[0])
        replace(user, made)
        return


def _dim(dim: Any, rank: int) -> int:
    return dim + rank if dim < 0 else dim


class _Sorted:
    """Rows brought into the order of their experts by one sort.

    flat: the experts [R], unsorted. order: the nodes that hold int64 [R], which row is where; sorted: the experts in
    that order. plain: what takes the place of each node whose rows are in that order, its rows being in their own.
    """

    def __init__(self, program: Program, node: fx.Node):
        self.program, self.flat = program, node.args[0]
        parts = [u for u in node.users if u.target is operator.getitem]
        several = node.target in (aten.sort.default, aten.sort.stable)
        self.order = {u for u in parts if u.args[1] == 1} if several else {node}
        self.sorted = {u for u in parts if u.args[1] == 0} if several else set()
        self.plain: dict[fx.Node, Any] = dict.fromkeys(self.sorted, self.flat)
        self.inverse: set[fx.Node] = set()
        self.tokens: dict[fx.Node, int] = {}  # order // k: the token of each row, k rows a token
        self.ends: set[fx.Node] = set()
        self.casts: set[fx.Node] = set()
        self.done: list[tuple[fx.Node, fx.Node]] = []

    def undo(self) -> None:
        """Do it, where every value in sorted order ends in one that is sorted back."""
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        waiting: list[tuple[int, fx.Node]] = []
        seen = {*self.order, *self.sorted}
        followed = list(seen)
        while True:
            for marked in followed:
                for user in marked.users:
                    if user in order and user not in seen and user.op == "call_function":
                        seen.add(user)
                        heapq.heappush(waiting, (order[user], user))
            if not waiting:
                break
            node = heapq.heappop(waiting)[1]
            if not self._step(node):
                return
            followed = (
                [node] if node in {*self.plain, *self.inverse, *self.tokens, *self.ends, *self.sorted} else []
            )
        for old, new in self.done:
            replace(old, new)

    def _step(self, node: fx.Node) -> bool:
        """Look at a node that reads something in the experts' order; False where it is not understood."""
        target = node.target
        if self._is_inverse(node):
            self.inverse.add(node)
        elif self._is_token(node):
            self.tokens[node] = node.args[1]  # type: ignore[assignment]
        elif target in _FRESH and self.order.issuperset(node.all_input_nodes):
            pass  # the ground that the inverse is written on
        elif self._counts(node):
            self.ends.add(node)
        elif target is aten.index.Tensor:
            return self._index(node)
        elif target is aten.index_add.default:
            return self._add_up(node)
        elif is_grouped(node):
            return self._product(node)
        else:
            return self._row_by_row(node)
        return True

    def _is_token(self, node: fx.Node) -> bool:
        """The token of each row: its number over so many experts a token."""
        floor = node.target is aten.floor_divide.default or (
            node.target is aten.div.Tensor_mode and node.kwargs.get("rounding_mode") == "floor"
        )
        return floor and node.args[0] in self.order and isinstance(node.args[1], int)

    def _is_inverse(self, node: fx.Node) -> bool:
        if node.target in (aten.argsort.default, aten.argsort.stable):
            return node.args[0] in self.order
        if node.target is aten.index_put.default:
            ground, places, values = node.args[:3]
            return (
                isinstance(ground, fx.Node)
                and ground.target in _FRESH
                and len(sequence_of(places)) == 1
                and sequence_of(places)[0] in self.order
                and isinstance(values, fx.Node)
                and values.target in (aten.arange.default, aten.arange.start)
                and not argument(node, "accumulate")
            )
        return False

    def _counts(self, node: fx.Node) -> bool:
        """Casts and counts of the experts in order, and the running sum of these: where each expert's rows end."""
        name = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else ""
        (read, *more) = node.all_input_nodes
        if more or read not in self.ends | self.sorted:
            return False
        numbers = read in self.sorted or read in self.casts
        if name in ("to", "_to_copy") and value(node).dtype != torch.bool:
            self.casts |= {node} if numbers else set()
            return True
        if name == "histc":  # one bin for each whole number from 0 on
            bins, low, high = (argument(node, n) for n in ("bins", "min", "max"))
            return numbers and low == 0 and high == bins - 1
        return (name == "bincount" and numbers) or (name == "cumsum" and not numbers)

    def _index(self, node: fx.Node) -> bool:
        source, places = node.args[0], sequence_of(node.args[1])
        if len(places) != 1 or not isinstance(source, fx.Node):
            return False
        (by,) = places
        if source in self.plain:
            self.done.append((node, self.plain[source]))
            return by in self.inverse
        if by in self.order:
            made: Any = source
            self.sorted |= {node} if source is self.flat else set()
        elif by in self.tokens:
            made = self._insert(node, aten.repeat_interleave.self_int, source, self.tokens[by], 0)
        elif by in self.plain:  # a row of a table for each expert
            made = self._insert(node, aten.index.Tensor, source, [self.plain[by]])
        else:
            return False
        self.plain[node] = made
        return same_shape(value(made), value(node))

    def _add_up(self, node: fx.Node) -> bool:
        """Rows added to their tokens: with the rows in their own order, each token's lie side by side."""
        ground, dim, by, rows = node.args[:4]
        if (
            by not in self.tokens
            or rows not in self.plain
            or dim != 0
            or argument(node, "alpha") not in (None, 1)
        ):
            return False
        assert isinstance(by, fx.Node) and isinstance(rows, fx.Node)
        shape = list(value(node).shape)
        made = self._insert(node, aten.reshape.default, self.plain[rows], [-1, self.tokens[by], *shape[1:]])
        made = self._insert(node, aten.sum.dim_IntList, made, [1])
        if not same_shape(value(made), value(ground)):
            return False
        self.done.append((node, self._insert(node, aten.add.Tensor, ground, made)))
        return True

    def _product(self, node: fx.Node) -> bool:
        (x, weight), ends = node.args[:2], argument(node, "offs")
        others = [a for a in (argument(node, "bias"), argument(node, "out_dtype")) if a is not None]
        if (
            x not in self.plain
            or ends not in self.ends
            or not isinstance(weight, fx.Node)
            or weight in self.plain
            or others
        ):
            return False
        assert isinstance(x, fx.Node)
        while ends.target in (aten.to.dtype, aten._to_copy.default):
            ends = ends.args[0]
        if (
            value(weight).dim() != 3
            or ends.target is not aten.cumsum.default
            or value(ends).shape != value(weight).shape[:1]
        ):
            return False
        dims = ("dim0", "dim1")
        turned = weight.target is aten.transpose.int and {argument(weight, d) % 3 for d in dims} == {1, 2}
        # the stored weight itself where it can be: packing takes weights along, and computes what is not one outside
        flipped = weight.args[0] if turned else self._insert(node, aten.transpose.int, weight, 1, 2)
        made = self._insert(node, torch.ops.thresher.expert_linear.default, self.plain[x], flipped, self.flat)
        self.plain[node] = made
        return value(made).dtype == value(node).dtype and same_shape(value(made), value(node))

    def _row_by_row(self, node: fx.Node) -> bool:
        """An operator that leaves the first dimension alone, done on rows in their own order."""
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        if not (pointwise or node.target in _FOLLOW) or any(
            n in self.order | self.inverse for n in node.all_input_nodes
        ):
            return False
        result = value(node)
        rank = result.dim() if isinstance(result, torch.Tensor) else 0
        for read in node.all_input_nodes:
            known = value(read)
            if not isinstance(known, torch.Tensor) or (
                read in self.plain and (not pointwise or known.dim() == rank)
            ):
                continue
            # beside rows only what is alike for all of them; a table of as many rows has an order of its own
            if read in self.plain or (known.dim() == rank and not (rank and same_size(known.shape[0], 1))):
                return False
        if not self._keeps_first(node) or self.sorted.intersection(node.all_input_nodes):
            return False
        args = fx.node.map_arg(node.args, lambda n: self.plain.get(n, n))
        made = self._insert(node, node.target, *args, **dict(node.kwargs))
        self.plain[node] = made
        first = [v[0] if isinstance(v, (list, tuple)) else v for v in (value(made), result)]
        return isinstance(first[0], torch.Tensor) and first[0].dim() > 0 and same_shape(first[0], first[1])

    def _keeps_first(self, node: fx.Node) -> bool:
        """Whether an operator with a dimension works along another one than the first."""
        at = {aten.cat.default: 1, aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2,
              aten.slice.Tensor: 1, aten.select.int: 1, aten.unsqueeze.default: 1, aten.squeeze.dim: 1,
              aten.mean.dim: 1, aten.sum.dim_IntList: 1, aten.softmax.int: 1, aten.glu.default: 1}  # fmt: skip
        if node.target not in at:
            return True
        place = at[node.target]
        given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
        dims = sequence_of(given) if isinstance(given, (list, tuple)) else [given]
        first: Any = sequence_of(node.args[0])[0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
        rank = value(first).dim() + (node.target is aten.unsqueeze.default)
        return bool(dims) and all(isinstance(d, int) and _dim(d, rank) != 0 for d in dims)

    def _insert(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call_before(before, target, args, kwargs)
