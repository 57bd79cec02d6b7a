"""How large a rotated program's values are at the calibration batches' sizes: waiting between steps, and at work."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program

from ...structure.recover import Structure
from .pieces import Batch
from .steps import Step, width
from .sweep import bind

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor,
          aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default,
          aten.detach.default}  # fmt: skip


class Sizes:
    """A rotated program's values in numbers. narrow: the dtype that activations are rounded to while they wait."""

    def __init__(
        self,
        program: Program,
        structure: Structure,
        batches: Sequence[Batch],
        narrow: torch.dtype | None,
    ):
        self.program, self.narrow = program, narrow
        self.hidden = width({structure.layers[0].input}) if structure.layers else 1
        shapes: dict[tuple[tuple[str, int], ...], int] = {}
        for batch in batches:
            key = tuple(sorted(symbols(program, batch).items()))
            shapes[key] = shapes.get(key, 0) + 1
        self.shapes = [(dict(key), count) for key, count in shapes.items()]
        self.tokens = sum(tokens_of(b) for b in batches)

    def bytes(self, node: fx.Node, sizes: Mapping[str, int], waits: bool = False) -> int:
        """Of a node's value for one batch; waits: as it is kept between steps."""
        known = value(node)
        if not isinstance(known, torch.Tensor) or node.op == "get_attr":
            return 0
        if node.target is aten.expand.default:
            return self.bytes(node.args[0], sizes, waits)  # type: ignore[arg-type]
        item = known.element_size()
        if waits and self.narrow is not None and known.is_floating_point() and width({node}) >= self.hidden:
            item = min(item, self.narrow.itemsize)
        return count(known.shape, sizes) * item

    def waiting(self, steps: Sequence[Step]) -> int:
        """Bytes that all batches hold between steps, where they hold most."""
        return max((self._held(step.live) for step in steps if step.advances), default=0)

    def _held(self, live: Collection[fx.Node]) -> int:
        return sum(many * self.bytes(n, sizes, True) for sizes, many in self.shapes for n in live)

    def working(self, step: Step) -> int:
        """Bytes of one batch's values, where a step holds most of them."""
        root: dict[fx.Node, fx.Node] = {}
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(step.nodes):
            source = node.args[0] if node.target in _VIEWS and node.args else None
            root[node] = root.get(source, source) if isinstance(source, fx.Node) else node
            for argument in node.all_input_nodes:
                last[root.get(argument, argument)] = i
        kept = {root.get(n, n) for n in step.shown | step.live}
        most = 0
        for sizes, _ in self.shapes:
            now = peak = 0
            alive: set[fx.Node] = set()
            for i, node in enumerate(step.nodes):
                if root[node] is node:
                    alive.add(node)
                    now += self.bytes(node, sizes)
                peak = max(peak, now)
                for done in {root.get(a, a) for a in node.all_input_nodes}:
                    if done in alive and last[done] == i and done not in kept:
                        alive.discard(done)
                        now -= self.bytes(done, sizes)
            most = max(most, peak + 8 * count(value(step.x).shape, sizes))  # its inputs in fp32, and weighted
        return most


def symbols(program: Program, batch: Batch) -> dict[str, int]:
    """The program's symbolic sizes by name, as a batch has them."""
    found: dict[str, int] = {}
    for node, given in zip(program.placeholders, bind(program, batch.inputs), strict=True):
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt):
            found[str(known)] = int(given)
        elif isinstance(known, torch.Tensor) and isinstance(given, torch.Tensor):
            for size, actual in zip(known.shape, given.shape):
                if isinstance(size, torch.SymInt):
                    found[str(size)] = actual
    return found


def count(shape: Sequence[Any], sizes: Mapping[str, int]) -> int:
    """Elements of a shape whose symbolic sizes are given by name."""
    return math.prod(n if isinstance(n, int) else number(n, sizes) for n in shape)


def number(size: Any, sizes: Mapping[str, int]) -> int:
    """A symbolic size as a number."""
    expression = size.node.expr
    return int(expression.xreplace({s: sizes.get(str(s), 1) for s in expression.free_symbols}))


def tokens_of(batch: Batch) -> int:
    """Real tokens of a batch."""
    return int(batch.real.sum()) if batch.real is not None else next(iter(batch.inputs.values())).numel()
