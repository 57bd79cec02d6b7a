"""A program of many layers from one of few, where all layers are alike.

    hidden = layer1(hidden, weights1)              hidden = layer1(hidden, weights1)
    hidden = layer2(hidden, weights2)   becomes    hidden = layer2(hidden, weights2)
    norm(hidden)                                   hidden = layer3(hidden, weights3) ... norm(hidden)

The last layer's nodes must be the ones of the layer before it, over its own weights and its own part of the cache, and
hand exactly one value on. They are then written once for every further layer. What is not so raises `Unlike`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import ThresherError
from . import names
from .nodes import fake_like
from .program import Program, Weight


class Unlike(ThresherError):
    """Why a program cannot be continued layer by layer, as a sentence."""


@dataclass(frozen=True)
class Layers:
    """A model's layers: where they are (`model.layers`), how many a short program has, and how many there are."""

    path: str
    kept: int
    count: int

    @property
    def further(self) -> range:
        """The layers that a short program lacks."""
        return range(self.kept, self.count)

    def of(self, name: str) -> tuple[int, str] | None:
        """The layer that a module or a weight of this name is in, and what it is called there."""
        found = re.match(re.escape(self.path) + r"\.(\d+)(?:\.(.*))?$", name)
        return (int(found[1]), found[2] or "") if found else None

    def named(self, index: int, rest: str) -> str:
        """The name of a layer, or of what lies in it under `rest`."""
        return f"{self.path}.{index}.{rest}" if rest else f"{self.path}.{index}"


def deepen(
    short: Program,
    layers: Layers,
    places: Sequence[tuple[int, str] | None],
    tensor: Callable[[int, str], torch.Tensor],
) -> Program:
    """The program of all layers.

    places: for each input of `short`, the layer that it is of, as of its cache, and what it is called there; an input of a
    further layer that is there already is taken. tensor: a layer's weight by its name in the layer. Inputs follow those of
    `short` layer by layer, and so do results, ahead of new values of inputs (`Program.updates`). Raises Unlike.
    """
    program = short.copy()
    two = _Two(program, layers, places)
    two.compare()
    return two.continued(program, tensor)


@dataclass
class _Two:
    """The last two layers of a short program."""

    program: Program
    layers: Layers
    places: Sequence[tuple[int, str] | None]
    pair: dict[fx.Node, fx.Node] = field(default_factory=dict)  # from the last layer but one to the last
    carried: fx.Node | None = None  # what the last layer reads of the one before

    def __post_init__(self) -> None:
        self.layer = {n: found for n in self.program.nodes() if (found := self._layer_of(n)) is not None}
        last = self.layers.kept - 1
        self.one = [n for n in self.layer if self.layer[n] == last - 1]
        self.two = [n for n in self.layer if self.layer[n] == last]
        self.inputs = {
            place: known for place, known in zip(self.program.placeholders, self.places) if known is not None
        }
        self.weights = {
            n: known
            for n in self.program.graph.nodes
            if (held := self.program.weight(n)) is not None
            and (known := self.layers.of(held.fqn)) is not None
        }

    def _layer_of(self, node: fx.Node) -> int | None:
        for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
            found = self.layers.of(names.path(str(path)))
            if found is not None:
                return found[0]
        return None

    def compare(self) -> None:
        """Raise Unlike unless the last two layers are the same over other weights."""
        if not self.two or len(self.one) != len(self.two):
            raise Unlike(f"Two layers have {len(self.one)} and {len(self.two)} nodes.")
        last = self.layers.kept - 1
        for held in (self.weights, self.inputs):
            at = {known: node for node, known in held.items()}
            self.pair.update(
                (node, at[last, name])
                for (layer, name), node in at.items()
                if layer == last - 1 and (last, name) in at
            )
        for a, b in zip(self.one, self.two):
            if a.target is not b.target or not self._same((a.args, a.kwargs), (b.args, b.kwargs)):
                raise Unlike(f"{a.name} and {b.name} stand in the same place of two layers and differ.")
            self.pair[a] = b
        if self.carried is None:
            raise Unlike("No layer reads what the one before makes.")

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a in self.pair:
                return self.pair[a] is b
            before = self.layers.kept - 2
            if self.layer.get(b) == before:
                if self.carried is not None and self.carried is not b:
                    return False
                self.carried = b
                return self.layer.get(a) == before - 1
            return a is b or self._same_constants(a, b)
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(map(self._same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self._same(a[k], b[k]) for k in a)
        if isinstance(a, slice) and isinstance(b, slice):
            return self._same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return type(a) is type(b) and bool(a == b)

    def _same_constants(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two tensors that were made while tracing are equal."""
        x, y = self.program.weight(a), self.program.weight(b)
        if x is None or y is None or a in self.weights or b in self.weights:
            return False
        alike = x.tensor.dtype == y.tensor.dtype and x.tensor.shape == y.tensor.shape
        return alike and bool(torch.equal(x.tensor, y.tensor))

    def continued(self, program: Program, tensor: Callable[[int, str], torch.Tensor]) -> Program:
        graph, last = program.graph, self.layers.kept - 1
        assert self.carried is not None
        hidden, own = self.pair[self.carried], set(self.two)
        outputs = list(program.outputs)
        numbers = [i for i, node in enumerate(outputs) if node in own]
        for node in self.two:
            outside = [u for u in node.users if u not in own and u.op != "output"]
            if node is not hidden and outside:
                raise Unlike(f"{outside[0].name} reads {node.name} of the last layer.")
        if hidden in outputs:
            raise Unlike("What the last layer hands on is a result as well.")
        rest = [u for u in hidden.users if u not in own]

        mine = [
            (node, name)
            for node, (layer, name) in self.inputs.items()
            if layer == last and name.isidentifier()
        ]
        places = program.placeholders
        taken = [node for node, _ in mine]
        if any(u in own for n, (layer, name) in self.inputs.items() if layer == last and n not in taken for u in n.users
               if isinstance(n.meta.get("val"), torch.Tensor)):  # fmt: skip
            raise Unlike("A layer reads a tensor of its cache that has no name.")
        anchor, added = places[-1], dict[tuple[int, fx.Node], fx.Node]()
        known = {at: node for node, at in self.inputs.items()}
        for index in self.layers.further:
            for node, name in mine:
                if (index, name) in known:
                    added[index, node] = known[index, name]
                    continue
                with graph.inserting_after(anchor):
                    anchor = graph.placeholder(f"{node.name}_layer_{index}")
                anchor.meta = dict(node.meta)
                added[index, node] = anchor
                program.input_names.append(name)
        anchor = next((n for n in reversed(list(graph.nodes)) if n.op == "get_attr"), anchor)
        read = [(node, name) for node, (layer, name) in self.weights.items() if layer == last]
        made: dict[tuple[int, fx.Node], fx.Node] = {}
        position = {node: n for n, node in enumerate(graph.nodes)}
        tail = max(self.two, key=position.__getitem__)
        for index in self.layers.further:
            mapping: dict[fx.Node, fx.Node] = {self.carried: hidden}
            mapping.update((node, added[index, node]) for node, _ in mine)
            for node, name in read:
                weight = Weight(self.layers.named(index, name), tensor(index, name))
                with graph.inserting_after(anchor):
                    anchor = graph.create_node("get_attr", program.add_weight(weight))
                anchor.meta = {**node.meta, "val": fake_like(weight.tensor, node)}
                self._renamed(anchor, index)
                mapping[node] = anchor
            for node in self.two:
                with graph.inserting_after(tail):
                    tail = graph.node_copy(node, functools.partial(_replaced, mapping))
                tail.meta = dict(node.meta)
                self._renamed(tail, index)
                mapping[node] = made[index, node] = tail
            hidden = mapping[self.pair[self.carried]]
        for user in rest:
            user.replace_input_with(self.pair[self.carried], hidden)
        self._results(program, outputs, numbers, made, added, places)
        try:
            program.clean()
            program.alike = self.layers
        except RuntimeError as reason:
            raise Unlike(f"The graph's order does not allow it: {reason}") from reason
        return program

    def _results(
        self,
        program: Program,
        outputs: list[Any],
        numbers: Sequence[int],
        made: dict[tuple[int, fx.Node], fx.Node],
        added: dict[tuple[int, fx.Node], fx.Node],
        places: Sequence[fx.Node],
    ) -> None:
        """The results and the inputs' new values, those of further layers behind the others of their kind."""
        written, inputs = program.updates, program.placeholders
        results = [node for i, node in enumerate(outputs) if i not in written]
        results += [made[k, outputs[i]] for k in self.layers.further for i in numbers if i not in written]
        updates = [(outputs[i], place) for i, place in written.items()]
        for k in self.layers.further:
            for i in numbers:
                if i in written:
                    place = added.get((k, places[written[i]]))
                    if place is None:
                        raise Unlike("The last layer writes to what is not its own.")
                    updates.append((made[k, outputs[i]], inputs.index(place)))
        program.updates = {len(results) + n: place for n, (_, place) in enumerate(updates)}
        program.output_node.args = ((*results, *(node for node, _ in updates)),)

    def _renamed(self, node: fx.Node, index: int) -> None:
        """Let a copied node come from the same place of another layer."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return
        renamed = {}
        for key, (path, *kind) in stack.items():
            dotted = names.path(str(path))
            found = self.layers.of(dotted)
            renamed[f"{key}@{index}" if found else key] = (
                (self.layers.named(index, found[1]), *kind) if found else (path, *kind)
            )
        node.meta["nn_module_stack"] = renamed


def _replaced(mapping: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return mapping.get(node, node)
