"""Compiles a program's layers once: what comes before them, one layer for all that are alike, what comes behind.

    repeats   found by `repeats.find` in the lowered graph (weights are arguments already)
    becomes   three callables, and a list of steps that hands each layer its weights and what the last one gave

A program of 30 layers then costs the compilation of one, and the steps between layers move no data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value

from ..sizes import Sizes, symbols_of
from .repeats import Repeats

Compile = Callable[[fx.GraphModule, Sequence[bool]], Callable[..., Sequence[Any]]]
"""Compiles a graph; told of each of its inputs whether it stays in its place between calls."""


@dataclass
class _Step:
    """One call: the slots it reads, the slots it fills, and those nobody reads afterwards."""

    call: Callable[..., Sequence[Any]]
    reads: list[int]
    fills: list[int]
    done: list[int]


@dataclass
class _Piece:
    """A graph to compile, for each of its inputs whether it stays in its place, and of each call the slots it reads and
    those it fills."""

    graph: fx.GraphModule
    stays: list[bool]
    calls: list[tuple[list[int], list[int]]]


class Layered:
    """Runs a program piece by piece; called with the values of the graph's placeholders, in order."""

    def __init__(self, graph: fx.Graph, repeats: Repeats, stays: Sequence[bool], compile: Compile):
        places = [n for n in graph.nodes if n.op == "placeholder"]
        self._slots: dict[fx.Node, int] = {}
        self._sizes = Sizes(places)
        self._count = 0
        for node in places:
            self._slot(node)
        self._count += len(self._sizes)  # these follow the inputs
        self._fixed = {node for node, stay in zip(places, stays) if stay}
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        results = list(output.args[0])
        self._constants = [None if isinstance(r, fx.Node) else r for r in results]
        wanted = [r for r in results if isinstance(r, fx.Node)]
        later = itertools.chain(*repeats.blocks, repeats.after)
        read = {a for n in later for a in n.all_input_nodes} | set(wanted)

        pieces = [self._alone(repeats.before, read)] if repeats.before else []
        pieces.append(self._layers(repeats))
        if repeats.after:
            pieces.append(self._alone(repeats.after, set(wanted)))
        steps = []  # all pieces are there before the first is compiled: what cannot be cut up costs nothing
        for piece in pieces:
            call = compile(piece.graph, piece.stays)
            steps += [_Step(call, reads, fills, []) for reads, fills in piece.calls]
        self._results = [self._slots[r] if isinstance(r, fx.Node) else -1 for r in results]
        self._steps = _release(steps, self._results)
        self._inputs = len(places)

    def __call__(self, *given: Any) -> list[Any]:
        slots = [*given, *self._sizes.of(given), *[None] * (self._count - self._inputs - len(self._sizes))]
        for step in self._steps:
            made = step.call(*[slots[i] for i in step.reads])
            for slot in step.done:
                slots[slot] = None
            for slot, one in zip(step.fills, made):
                slots[slot] = one
        return [slots[i] if i >= 0 else known for i, known in zip(self._results, self._constants)]

    def _slot(self, node: fx.Node) -> int:
        if node not in self._slots:
            self._slots[node] = self._count
            self._count += 1
        return self._slots[node]

    def _alone(self, nodes: Sequence[fx.Node], read: set[fx.Node]) -> _Piece:
        own = set(nodes)
        inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in own))
        made = [n for n in nodes if n in read]
        graph, sizes = self._graph(nodes, inputs, made)
        stays = [False] * len(sizes) + [n in self._fixed for n in inputs]
        return _Piece(graph, stays, [(sizes + list(map(self._slot, inputs)), list(map(self._slot, made)))])

    def _layers(self, repeats: Repeats) -> _Piece:
        first, inputs = repeats.blocks[0], repeats.inputs
        graph, sizes = self._graph(first, inputs[0], [first[i] for i in repeats.exports])
        fixed = [all(given[i] in self._fixed for given in inputs) for i in range(len(inputs[0]))]
        calls = [
            (sizes + list(map(self._slot, given)), [self._slot(block[i]) for i in repeats.exports])
            for block, given in zip(repeats.blocks, inputs)
        ]
        return _Piece(graph, [False] * len(sizes) + fixed, calls)

    def _graph(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], made: Sequence[fx.Node]
    ) -> tuple[fx.GraphModule, list[int]]:
        """A graph of these nodes, and the slots of the sizes that its shapes are written in, which come first."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        named = {s for n in (*nodes, *inputs) for s in symbols_of(value(n))}
        born = {
            s for n in nodes for s in n.meta.get("unbacked_bindings") or ()
        }  # only here do data decide them
        slots = []
        for symbol in sorted(named - born, key=str):  # shapes that no input spells out must still have a name
            slot, known = self._sizes.slot(symbol)
            place = graph.placeholder(f"size_{symbol}")
            place.meta["val"] = known
            slots.append(slot)
        for node in inputs:
            place = graph.placeholder(node.name)
            place.meta = {"val": value(node)}
            copies[node] = place
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[n] for n in made))
        return fx.GraphModule(torch.nn.Module(), graph), slots


def _release(steps: Sequence[_Step], results: Sequence[int]) -> list[_Step]:
    """Let go of each value behind the last step that reads it; what the caller gave and gets stays."""
    seen = set(results)
    for step in reversed(steps):
        step.done = [slot for slot in dict.fromkeys(step.reads) if slot not in seen]
        seen |= {*step.reads, *step.fills}
    return list(steps)
