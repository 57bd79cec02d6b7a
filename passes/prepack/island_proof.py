"""Shows that an island is right: that a real token's result reads neither another row nor what stands at pads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from thresher.compat import is_fake, without_fake_mode
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from ..extract import extract
from ..tokens.axes import BATCH, SEQUENCE, TOKENS, TokenAxes
from .island import Island, laid_out
from .visibility import on_cpu, padding_patterns

aten = torch.ops.aten
_NEAR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""How far two runs of the same arithmetic on the same real tokens may lie apart, relative to the largest value."""


class Proof:
    """Runs an island on the example's sizes, on a CPU, with random values further up: what a model does to pads on the way
    to an island, such as setting them to zero, is part of the proof."""

    def __init__(
        self,
        program: Program,
        padding: fx.Node,
        island: Island,
        axes: TokenAxes,
        starts: Collection[fx.Node],
        others: Mapping[fx.Node, Island],
    ):
        self.padding, self.island, self.axes = padding, island, axes
        self.places = program.placeholders
        self.above = _above(island, axes, starts, others)
        self.before = on_cpu(extract(program, self._with_places(self.above), island.entering))
        self.around = on_cpu(extract(program, self.places, island.around)) if island.around else None
        self.given = self._with_places([*island.entering, *island.around])
        self.part = on_cpu(extract(program, self.given, [island.end]))
        self.make = torch.Generator().manual_seed(0)

    def _with_places(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return list(dict.fromkeys([*nodes, *self.places]))

    def alike(self) -> Any:
        """What tells this computation from others, whatever its weights' values."""
        return tuple(_signature(p) for p in (self.before, self.around, self.part) if p is not None)

    def holds(self, holed: bool) -> bool:
        """Whether real tokens' results depend on their own row's real tokens alone, and on themselves. holed: in rows with
        pads between real tokens; else in rows without."""
        programs = [p for p in (self.before, self.part, self.around) if p is not None]
        tensors = [w.tensor for p in programs for w in p.weights.values()]
        if any(t.device.type == "meta" or is_fake(t) for t in tensors):
            return False
        patterns, batch = padding_patterns(self.axes.sequence), self.axes.batch
        patterns = [p for p in patterns if (bool((p[1:] > p[:-1]).any() and (p[:-1] > p[1:]).any())) == holed]
        if not patterns:
            return False
        try:
            with without_fake_mode(), torch.no_grad():
                for start in range(0, len(patterns), batch):
                    chosen = (patterns[start : start + batch] + patterns * batch)[:batch]
                    if not self._holds(torch.stack(chosen)):
                        return False
        except (RuntimeError, ValueError, IndexError, TypeError):  # it does not run by itself
            return False
        return True

    def _holds(self, real: torch.Tensor) -> bool:
        inputs = {p: self._input(p, real) for p in self.places}
        given = dict(inputs)
        if self.around is not None:
            given.update(zip(self.island.around, self.around.run(*(inputs[p] for p in self.places))))

        def entering(above: list[torch.Tensor]) -> list[torch.Tensor]:
            known = {**inputs, **dict(zip(self.above, above))}
            return self.before.run(*(known[n] for n in self._with_places(self.above)))

        def run(values: list[torch.Tensor]) -> torch.Tensor:
            known = {**given, **dict(zip(self.island.entering, values))}
            return self.part.run(*(known[n] for n in self.given))[0].float()

        above = [self._random(n) for n in self.above]
        found = entering(above)
        base = run(
            [self._at(t, e, ~real, 0.0) for t, e in zip(found, self.island.entering)]
        )  # as it is packed
        near = _NEAR.get(value(self.island.end).dtype, 1e-4) * float(base[real].abs().max().clamp_min(1e-6))
        for pads in (1.0, 3.0):
            made = run(
                entering([self._at(t, n, ~real, self._random(n) * pads) for t, n in zip(above, self.above)])
            )
            if not bool(((base - made)[real].abs() <= near).all()):  # NaN is no match
                return False
        row = int(real.sum(1).argmax())
        apart = torch.zeros_like(real)
        apart[row] = True
        moved = run(entering([self._at(t, n, apart, self._random(n)) for t, n in zip(above, self.above)]))
        changed = ((base - moved).abs() > near).flatten(2).any(-1)
        return bool(changed[row][real[row]].all()) and not bool((changed & ~apart & real).any())

    def _input(self, place: fx.Node, real: torch.Tensor) -> Any:
        known = value(place)
        if place is self.padding:
            return real.to(known.dtype)
        if not isinstance(known, torch.Tensor):
            return example_of(known)
        shape = [example_of(s) for s in known.shape]
        if known.is_floating_point():
            return torch.randn(shape, generator=self.make).to(known.dtype)
        return torch.ones(shape, dtype=known.dtype)

    def _random(self, node: fx.Node) -> torch.Tensor:
        known = value(node)
        made = torch.randn([example_of(s) for s in known.shape], generator=self.make)
        return made.to(known.dtype) if known.is_floating_point() else (made > 0).to(known.dtype)

    def _at(self, tensor: torch.Tensor, node: fx.Node, where: torch.Tensor, other: Any) -> torch.Tensor:
        """A value with others at some positions. where: bool [B, S]."""
        labels, other = self.axes[node], torch.as_tensor(other, dtype=tensor.dtype)
        if TOKENS in labels:
            shape = [-1 if label == TOKENS else 1 for label in labels]
            return torch.where(where.flatten().reshape(shape), other, tensor)
        order = where if labels.index(BATCH) < labels.index(SEQUENCE) else where.t()
        shape = [n if label is not None else 1 for label, n in zip(labels, tensor.shape)]
        return torch.where(order.reshape(shape), other, tensor)


def _signature(program: Program) -> Any:
    order: dict[fx.Node, int] = {}
    found = []
    for node in program.graph.nodes:
        order[node] = len(order)
        reads = fx.node.map_arg((node.args, node.kwargs), lambda n: ("node", order[n]))
        known = value(node)
        shape = (str(tuple(known.shape)), known.dtype) if isinstance(known, torch.Tensor) else str(known)
        found.append(
            (
                node.op,
                node.target if node.op == "call_function" else "",
                str(reads),
                shape if node.op != "output" else "",
            )
        )
    return tuple(found)


def _above(
    island: Island, axes: TokenAxes, starts: Collection[fx.Node], others: Mapping[fx.Node, Island]
) -> list[fx.Node]:
    """Values further up that an island's inputs are computed from: the residual stream, or where the tokens come from.
    Islands in between, such as a convolution in front of a scan, are computed as the padded model does."""
    found: dict[fx.Node, None] = {}
    stack, seen = list(island.entering), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        between = others.get(node)
        read = [
            a for a in (between.entering if between is not None else node.all_input_nodes) if a in axes.labels
        ]
        stream = node.target is aten.add.Tensor and len(read) == 2
        plain = isinstance(axes.labels[node], tuple) and laid_out(axes.labels[node])
        if node in starts or not read or (stream and plain):
            found[node] = None
        else:
            stack += read
    return list(found)
