"""Turns a step's graph into the list that `kernels/csrc/step.cpp` runs, and a prelude in Python.

    matched:  a graph whose products are all of one token a row, and of which C++ knows all but what stands before the
              first of them (masks, positions, the embedding)
    becomes:  the prelude, once a step, as PyTorch runs it; then one call for everything else

What a cache holds is written where it lies: `copy_(cache, index_copy(cache, ...))` copies one token.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher import ops
from thresher.graph.nodes import value

from .growing import grown
from .operations import HEAVY, PUT, TYPES, VIEW, WRITE, Made, Operation, Unfit, operation, writable

aten = torch.ops.aten
RESHAPE = 0


@dataclass
class Tape:
    """prelude: a module from `reads` (numbers of placeholders) to the tensors in `early` and the numbers in `sizes`.
    ranks: the dimensions of the tensors in `early`.
    external: what a call gives, in order: ("place", index), ("early", index), ("made", tensor), ("result", index); those
        of sizes that never change come first, `fixed` of them. written: numbers of placeholders that are written to.
    results: for each of the graph's, ("result", index), ("place", index), ("early", index) or ("known", constant).
    made: the fake tensors of results to make room for. grown: see `growing.grown`.
    code, values, slots, constants: see `step_make`."""

    prelude: fx.GraphModule
    reads: list[int]
    early: int
    ranks: list[int]
    external: list[tuple[str, Any]]
    fixed: int
    written: set[int]
    results: list[tuple[str, Any]]
    made: list[torch.Tensor]
    grown: dict[int, int]
    code: list[int]
    values: int
    slots: int
    constants: list[float]


def build(graph: fx.Graph) -> Tape:
    """Raises Unfit where the graph is not such a step."""
    return _Builder(graph).tape()


class _Builder:
    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.places = [n for n in graph.nodes if n.op == "placeholder"]
        self.output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self.wanted = list(self.output.args[0])
        self.forms: dict[fx.Node, Operation] = {}
        self.prelude = self._split()
        self.in_place = self._written_in_place()
        self.order = [n for n in graph.nodes if n in self.forms]
        self.external: dict[Any, int] = {}
        self.described: list[tuple[str, Any]] = []
        self.early: list[fx.Node] = []
        self.sizes: list[Any] = []
        self.constants: list[float] = []
        self.made: list[torch.Tensor] = []

    def _split(self) -> set[fx.Node]:
        """Nodes that run in Python: those without a form in C++, and all that they need."""
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        strange: dict[fx.Node, str] = {}
        for node in calls:
            if node.target in (aten.copy_.default, aten.index_copy.default):
                continue
            try:
                self.forms[node] = operation(node)
            except Unfit as reason:
                if node.target in HEAVY or getattr(node.target, "namespace", "") == ops.NAMESPACE:
                    raise Unfit(f"{node.name}: {reason}") from None
                strange[node] = str(reason)
        early, waiting = set[fx.Node](), list(strange)
        while waiting:
            node = waiting.pop()
            if node in early or node.op != "call_function":
                continue
            early.add(node)
            if node in self.forms and self.forms[node].product:
                raise Unfit(f"Behind the first product: {' '.join(dict.fromkeys(strange.values()))}")
            if node.target in (aten.copy_.default, aten.index_copy.default):
                raise Unfit(f"{node.name} is read by what runs in Python.")
            waiting += node.all_input_nodes
        if not any(f.product for f in self.forms.values()):
            raise Unfit("It has no product.")
        for node in early:
            self.forms.pop(node, None)
        return early

    def _written_in_place(self) -> dict[fx.Node, fx.Node | None]:
        """For each `copy_`, the `index_copy` that can write where it would; None for a plain copy."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        found: dict[fx.Node, fx.Node | None] = {}
        for node in self.graph.nodes:
            if node.target is aten.index_copy.default:
                readers = [u for u in node.users if u.target is aten.copy_.default and u.args[1] is node]
                place = node.args[0]
                last = max((order[u] for u in place.users if u not in readers), default=-1)
                if len(readers) != 1 or readers[0].args[0] is not place or place.op != "placeholder":
                    raise Unfit(f"{node.name} makes a copy of a cache.")
                if last > order[node]:
                    raise Unfit(f"{place.name} is read behind a write to it.")
                found[readers[0]] = node
                self.forms[node] = Operation(PUT, [place, node.args[2], node.args[3]], sizes=[node.args[1]])
        for node in self.graph.nodes:
            if node.target is aten.copy_.default and node not in found:
                if len(node.args) > 2 or node.kwargs or node.args[0].op != "placeholder" or node.users:
                    raise Unfit(f"{node.name} writes to what is no input.")
                found[node] = None
                self.forms[node] = Operation(WRITE, [node.args[0], node.args[1]])
        for node in found:
            writable(node)
        return found

    def tape(self) -> Tape:
        results = self._results()
        owns = {where: node for node, where in self._directly(results).items()}
        for node in self.order:
            for read in self.forms[node].reads:
                self._external(read)
            for size in self.forms[node].sizes:
                if isinstance(size, fx.Node) and size not in self.sizes:
                    self.sizes.append(size)
        for index in range(len(self.made)):
            self._note(("result", index))
        self.described.sort(key=self._changes)  # stable
        self.external = {_key(what): index for index, what in enumerate(self.described)}
        fixed = sum(not self._changes(what) for what in self.described)
        written = {self.places.index(f.reads[0]) for f in self.forms.values() if f.code in (WRITE, PUT)}
        numbers, slots, count, used = self._numbered(owns)
        code: list[int] = []
        for node in self.order:
            form, known = self.forms[node], value(node)
            kind = TYPES[known.dtype] if isinstance(known, torch.Tensor) else 0
            code += [form.code, form.kind, kind, numbers[node], slots.get(node, -1)]
            reads = [self._number(read, numbers) for read in form.reads]
            code += [len(reads), *reads, len(form.sizes)]
            for size in form.sizes:
                code += [0, self.sizes.index(size)] if isinstance(size, fx.Node) else [int(size), -1]
            code += [len(form.numbers), *(struct.unpack("q", struct.pack("d", n))[0] for n in form.numbers)]
        for where, node in zip(self._places, self._copied):
            code += [WRITE, 0, 0, 0, -1, 2, self.external[("result", where)], numbers[node], 0, 0]
        module, reads = self._prelude()
        ranks = [value(n).dim() for n in self.early]
        return Tape(module, reads, len(self.early), ranks, self.described, fixed, written, results, self.made,
                    grown(owns, self.forms, self.places), code, count, used,
                    self.constants)  # fmt: skip

    def _changes(self, what: tuple[str, Any]) -> bool:
        """Whether a value's sizes may change from call to call."""
        kind, which = what
        if kind == "place":
            return not all(isinstance(size, int) for size in value(self.places[which]).shape)
        return kind != "made"

    def _results(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for result in self.wanted:
            if not isinstance(result, fx.Node):
                found.append(("known", result))
            elif result.op == "placeholder":
                found.append(("place", self.places.index(result)))
            elif result in self.prelude:
                if not isinstance(value(result), torch.Tensor):
                    raise Unfit("A result is a size.")
                found.append(("early", self._early(result)))
            else:
                same = [i for i, r in enumerate(self.wanted[: len(found)]) if r is result]
                if same:
                    found.append(found[same[0]])
                    continue
                found.append(("result", len(self.made)))
                self.made.append(value(result))
        return found

    def _directly(self, results: Sequence[tuple[str, Any]]) -> dict[fx.Node, int]:
        """Nodes that are written where their result lies. The others, views, are copied there in the end."""
        direct: dict[fx.Node, int] = {}
        self._copied: list[fx.Node] = []
        self._places: list[int] = []
        for node, (kind, where) in zip(self.wanted, results):
            if kind != "result" or where in direct.values() or where in self._places:
                continue
            if self.forms[node].code in (VIEW, PUT):
                self._copied.append(node)
                self._places.append(where)
            else:
                direct[node] = where
        return direct

    def _numbered(self, owns: dict[int, fx.Node]) -> tuple[dict[fx.Node, int], dict[fx.Node, int], int, int]:
        """A number for each node's value, and the memory of those that need some; memory is used again."""
        direct = {node: where for where, node in owns.items()}
        numbers: dict[fx.Node, int] = {}
        count = len(self.described) + len(self.constants)
        for node in self.order:
            if node in direct:
                numbers[node] = self.external[("result", direct[node])]
            else:
                numbers[node] = count
                count += 1
        roots: dict[fx.Node, set[fx.Node]] = {}  # whose memory a value may lie in
        last: dict[fx.Node, int] = {}
        for at, node in enumerate(self.order):
            form = self.forms[node]
            read = [r for r in form.reads if isinstance(r, fx.Node) and r in self.forms]
            for one in read:
                for root in roots[one]:
                    last[root] = at
            roots[node] = {node} | (roots[read[0]] if form.code == VIEW and read else set())
        for node in self._copied:
            for root in roots[node]:
                last[root] = len(self.order)
        slots: dict[fx.Node, int] = {}
        free: list[int] = []
        used = 0
        ends: dict[int, list[int]] = {}
        for at, node in enumerate(self.order):
            form = self.forms[node]
            makes = form.kind == RESHAPE if form.code == VIEW else form.code not in (WRITE, PUT)
            if makes and node not in direct:
                if not free:
                    free.append(used)
                    used += 1
                slots[node] = free.pop()
                ends.setdefault(max(last.get(node, at), at), []).append(slots[node])
            free += ends.pop(at, [])
        return numbers, slots, count, used

    def _external(self, read: Any) -> None:
        if isinstance(read, fx.Node):
            if read.op == "placeholder":
                self._note(("place", self.places.index(read)))
            elif read in self.prelude:
                self._note(("early", self._early(read)))
        elif isinstance(read, Made):
            self._note(("made", read.tensor))
        elif isinstance(read, (int, float)):
            if float(read) not in self.constants:
                self.constants.append(float(read))
        elif read is not None:
            raise Unfit(f"It reads {read!r}.")

    def _note(self, what: tuple[str, Any]) -> None:
        if _key(what) not in self.external:
            self.external[_key(what)] = len(self.described)
            self.described.append(what)

    def _number(self, read: Any, numbers: dict[fx.Node, int]) -> int:
        if read is None:
            return -1
        if isinstance(read, Made):
            return self.external[("made", id(read.tensor))]
        if isinstance(read, (int, float)):
            return len(self.described) + self.constants.index(float(read))
        if read.op == "placeholder":
            return self.external[("place", self.places.index(read))]
        return self.external[("early", self._early(read))] if read in self.prelude else numbers[read]

    def _early(self, node: fx.Node) -> int:
        if node not in self.early:
            self.early.append(node)
        return self.early.index(node)

    def _prelude(self) -> tuple[fx.GraphModule, list[int]]:
        """The nodes that Python runs, as a module of the placeholders that they read."""
        needed = [n for n in self.graph.nodes if n in self.prelude]
        given = [*self.early, *self.sizes]
        read = {a for n in needed for a in n.all_input_nodes} | set(given)
        reads = [i for i, place in enumerate(self.places) if place in read]
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for index in reads:
            copies[self.places[index]] = graph.placeholder(self.places[index].name)
        for node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[n] for n in given))
        graph.eliminate_dead_code()
        return fx.GraphModule(torch.nn.Module(), graph), reads


def _key(what: tuple[str, Any]) -> tuple[str, Any]:
    return (what[0], id(what[1])) if what[0] == "made" else what
