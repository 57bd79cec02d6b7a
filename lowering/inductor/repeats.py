"""Finds the layers of a lowered graph: one stretch of nodes that comes again and again.

Nothing here knows what a transformer is. A node is labelled by its operator, its constants and the sizes of what it
reads and makes; layers are where these labels repeat with one period. A stretch counts only if all its repetitions
read and make the same things in the same places, so that one compiled callable serves them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value

LEAST = 4  # repetitions below which compiling what surrounds them apart costs more than is saved


@dataclass
class Repeats:
    """Stretches of nodes that compute the same from different inputs.

    blocks: the nodes of each stretch, in order; the n-th node of every block is the same operation.
    inputs: for each block, the nodes outside that it reads; the n-th input of every block goes to the same places.
    exports: places in a block of the nodes that something outside any block reads.
    before, after: the other nodes, in order: those ahead of the first block, those behind the last.
    """

    blocks: list[list[fx.Node]]
    inputs: list[list[fx.Node]]
    exports: list[int]
    before: list[fx.Node]
    after: list[fx.Node]


def find(graph: fx.Graph, inputs: int) -> Repeats | None:
    """The repeated stretch that covers most of a graph, or None where fewer than `LEAST` repetitions are alike.

    inputs: how many of its placeholders, the first ones, are no weights.
    """
    nodes = _shared_first([n for n in graph.nodes if n.op not in ("placeholder", "output")], graph, inputs)
    if any(n.op != "call_function" for n in nodes):
        return None
    numbers: dict[Any, int] = {}
    labels = [numbers.setdefault(_label(n), len(numbers)) for n in nodes]
    best: Repeats | None = None
    for first, period, count in _runs(labels):
        if best is not None and period * count <= sum(map(len, best.blocks)):
            break
        for start in _cuts(nodes, first, period, count):
            found = _alike(nodes, start, period, (first + period * count - start) // period)
            if found is not None and (
                best is None or len(found.blocks) * period > sum(map(len, best.blocks))
            ):
                best = found
                break
    return best


def _shared_first(nodes: Sequence[fx.Node], graph: fx.Graph, inputs: int) -> list[fx.Node]:
    """The nodes in another valid order: what many layers read and no layer makes stands ahead of all layers, and not in
    the first one, where a trace happens to meet it."""
    free = set([n for n in graph.nodes if n.op == "placeholder"][:inputs])
    for node in nodes:
        if all(a in free for a in node.all_input_nodes):
            free.add(node)
    shared = {n for n in nodes if n in free and (isinstance(value(n), torch.SymInt) or len(n.users) >= LEAST)}
    for node in reversed(nodes):
        if any(user in shared for user in node.users):
            shared.add(node)
    return [n for n in nodes if n in shared] + [n for n in nodes if n not in shared]


def _label(node: fx.Node) -> Any:
    def of(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return _kind(value(argument))
        if isinstance(argument, (list, tuple)):
            return tuple(of(a) for a in argument)
        return (type(argument).__name__, str(argument))

    named = tuple((name, of(given)) for name, given in sorted(node.kwargs.items()))
    return (str(node.target), of(node.args), named, _kind(value(node)))


def _kind(known: Any) -> Any:
    if isinstance(known, torch.Tensor):
        sizes = (*known.shape, "", *known.stride())
        return ("tensor", str(known.dtype), str(known.device), tuple(map(str, sizes)))
    if isinstance(known, (list, tuple)):
        return tuple(map(_kind, known))
    return (type(known).__name__, str(known))


def _runs(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, period, count): stretches of `count` repetitions, those that cover most first."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for place, label in enumerate(labels):
        if label in last:
            distances[place - last[label]] += 1
        last[label] = place
    found = []
    for period, _ in distances.most_common(16):
        run = 0
        for place in range(len(labels) - period + 1):
            if place + period < len(labels) and labels[place] == labels[place + period]:
                run += 1
                continue
            count = run // period + 1
            if count >= LEAST:
                found.append((place - run, period, count, run))
            run = 0
    # a period's multiples cover as much: the shortest is wanted
    found.sort(key=lambda f: (-(f[3] + f[1]), f[1]))
    return [(first, period, (run + period) // period) for first, period, _, run in found]


def _cuts(nodes: Sequence[fx.Node], first: int, period: int, count: int) -> Iterator[int]:
    """Where blocks may start, the places that the fewest values cross first."""
    place = {node: index for index, node in enumerate(nodes)}
    middle = first + (count // 2) * period
    crossing = []
    for shift in range(period):
        cut = middle + shift
        live = sum(
            any(place.get(user, -1) >= cut and place.get(user, -1) < cut + period for user in node.users)
            for node in nodes[cut - period : cut]
        )
        crossing.append((live, shift))
    for _, shift in sorted(crossing)[:8]:
        yield first + shift
        yield (
            first + shift + period
        )  # the first repetition may read its input twice, as a layer's start and as its residual


def _alike(nodes: Sequence[fx.Node], start: int, period: int, count: int) -> Repeats | None:
    """The blocks from `start`, where all of them are wired alike."""
    while count >= LEAST:
        blocks = [list(nodes[start + n * period : start + (n + 1) * period]) for n in range(count)]
        wiring = [_wiring(block) for block in blocks]
        same = next((n for n in range(1, count) if wiring[n][0] != wiring[0][0]), count)
        if same == count:
            end = start + count * period
            inside = [set(block) for block in blocks]
            exports = sorted(
                {
                    i
                    for block, own in zip(blocks, inside)
                    for i, n in enumerate(block)
                    if any(u not in own for u in n.users)
                }
            )
            return Repeats(blocks, [w[1] for w in wiring], exports, list(nodes[:start]), list(nodes[end:]))
        count = same
    return None


def _wiring(block: Sequence[fx.Node]) -> tuple[list[Any], list[fx.Node]]:
    """For each argument that is a node: its place in the block, or its number among what comes from outside."""
    place = {node: index for index, node in enumerate(block)}
    outside: dict[fx.Node, int] = {}
    slots: list[Any] = []
    for node in block:
        for argument in _arguments(node):
            if argument in place:
                slots.append(place[argument])
            else:
                slots.append(("input", outside.setdefault(argument, len(outside))))
    return slots, list(outside)


def _arguments(node: fx.Node) -> list[fx.Node]:
    """Each argument that is a node, once for each time it is one, in order."""
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        found.append(argument)
        return argument

    fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), note)
    return found
