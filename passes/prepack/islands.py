"""Finds parts that mix positions and end in tokens again; see `island`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.compat import is_fake
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from ..tokens.axes import BATCH, SEQUENCE, TokenAxes
from .island import Island, laid_out
from .island_proof import Proof

aten = torch.ops.aten
_READS = (
    aten.linear.default,
    aten.reshape.default,
)  # what an island may end before: a linear, or its flattened input


@dataclass
class Islands:
    """Finds islands while tokens are followed.

    seeds: where the tokens come from. sites: attentions. found: islands by their end.
    """

    program: Program
    padding: fx.Node
    tokens: fx.Node
    seeds: Iterable[fx.Node]
    sites: Iterable[fx.Node] = ()
    found: dict[fx.Node, Island] = field(default_factory=dict)
    _reached: set[fx.Node] = field(default_factory=set)
    _refused: set[fx.Node] = field(default_factory=set)
    _proven: dict[Any, tuple[bool, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reached = set(self.seeds)
        for node in self.program.nodes():
            if node.target is not aten.sym_size.int and not self._reached.isdisjoint(node.all_input_nodes):
                self._reached.add(node)

    @property
    def nodes(self) -> set[fx.Node]:
        """All that runs on padded rows inside."""
        return {n for island in self.found.values() for n in island.nodes}

    def close(self, reader: fx.Node, axes: TokenAxes) -> bool:
        """Whether what a node reads, where tokens could not be followed to, is an island's result; it is labelled then."""
        end: Any = reader.args[0] if reader.args else None
        if reader.target not in _READS or end not in axes.stopped or end in self._refused:
            return False
        if not self._token_rows(end, axes) or (
            reader.target is aten.reshape.default and value(reader).dim() != 2
        ):
            return False
        island = self._island(end, axes)
        holds = False
        if island is not None:
            starts = {*self.seeds, *self.sites}
            proof = Proof(self.program, self.padding, island, axes, starts, self.found)
            alike = proof.alike()  # layers are: what holds for one holds for all
            if alike not in self._proven:
                first = proof.holds(False)
                self._proven[alike] = (first, first and proof.holds(True))
            holds, island.holes = self._proven[alike]
        if island is None or not holds:
            self._refused.add(end)
            return False
        for node in island.nodes:
            axes.stopped.pop(node, None)
        axes.labels[end] = (BATCH, SEQUENCE, *(None,) * (value(end).dim() - 2))
        self.found[end] = island
        return True

    def _token_rows(self, node: fx.Node, axes: TokenAxes) -> bool:
        """Whether a value has the shape [B, S, ...] of floating numbers."""
        known = value(node)
        if not isinstance(known, torch.Tensor) or known.dim() < 3 or not known.is_floating_point():
            return False
        wanted = value(self.tokens).shape[:2]
        return [example_of(s) for s in known.shape[:2]] == [axes.batch, axes.sequence] and all(
            isinstance(a, int) == isinstance(b, int) for a, b in zip(known.shape, wanted)
        )

    def _island(self, end: fx.Node, axes: TokenAxes) -> Island | None:
        """What lies between labelled values and a result, or None where it cannot be cut out."""
        inside, stack = {end}, [end]
        entering: dict[fx.Node, Any] = {}
        around: dict[fx.Node, Any] = {}
        while stack:
            for read in stack.pop().all_input_nodes:
                if read in inside or not isinstance(value(read), torch.Tensor):
                    if read not in inside and isinstance(value(read), (list, tuple)):
                        inside.add(read)
                        stack.append(read)
                elif read in axes.labels:
                    entering[read] = None
                elif read.op == "get_attr":
                    if self.program.weight(read) is None or is_fake(self.program.weight(read).tensor):  # type: ignore[union-attr]
                        return None
                elif read in self._reached:
                    inside.add(read)
                    stack.append(read)
                else:
                    around[read] = None
        nodes = [n for n in self.program.graph.nodes if n in inside]
        known = all(isinstance(axes.labels[e], tuple) and laid_out(axes.labels[e]) for e in entering)
        kept = all(u in inside or _sizes_only(u) for n in nodes if n is not end for u in n.users)
        own = all(self._of_the_padding(a) for a in around)
        if not entering or not known or not kept or not own or any(n.op != "call_function" for n in nodes):
            return None
        if any(isinstance(a, fx.Node) and a.op == "get_attr" and self.program.weight(a) is None
               for n in nodes for a in n.all_input_nodes):  # fmt: skip
            return None  # the graph of a higher-order operator
        why = next(
            (axes.stopped[n] for n in nodes if n in axes.stopped), "tokens are not followed through it"
        )
        return Island(end, nodes, list(entering), list(around), why)

    def _of_the_padding(self, node: fx.Node) -> bool:
        """Whether nothing but the padding mask, the ids and sizes decide a value: another input may be of other tokens."""
        stack, seen = [node], set()
        while stack:
            one = stack.pop()
            if one in seen or not isinstance(value(one), torch.Tensor):
                continue
            seen.add(one)
            if one.op == "placeholder" and one not in (self.padding, self.tokens):
                return False
            if one.target is not aten.sym_size.int:
                stack += one.all_input_nodes
        return True


def _sizes_only(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int
