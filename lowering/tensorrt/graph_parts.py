"""A Program cut into parts that become engines and operators that stay in PyTorch between them.

    outer, parts, names = cut(program, inside)

Operators of ours that an engine cannot hold keep their own kernels; what lies between them goes to TensorRT. An engine
takes tensors alone: the sizes that a part needs are read from its tensors, and one that none of them has comes in as
the length of a tensor made for it. Whatever computes sizes stays outside, where it costs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.compat import lazy_module
from thresher.errors import ThresherError
from thresher.graph.nodes import value
from thresher.graph.program import Program

from .stretches import SMALLEST, Run, dimension_of, is_size, plain, stretches, tensors_of


@dataclass
class Part:
    """One part for an engine: its name in the outer graph, and itself as a Program of tensors."""

    name: str
    program: Program

    @property
    def operators(self) -> list[str]:
        return [str(n.target) for n in self.program.nodes()]


def cut(
    program: Program, inside: Callable[[fx.Node], bool] = plain
) -> tuple[fx.GraphModule, list[Part], list[str]]:
    """The program with a call of a part in the place of each stretch of nodes that belong inside.

    Returns the outer graph (its parts are to be set as submodules of their names), the parts, and the names of the
    weights that the outer graph takes behind its inputs. Raises ThresherError where there is nothing for an engine.
    """
    return _Cutter(program, inside).cut()


class _Cutter:
    def __init__(self, program: Program, inside: Callable[[fx.Node], bool]):
        self.program = program
        self.items = stretches(program, inside)
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.weights: list[str] = []

    def cut(self) -> tuple[fx.GraphModule, list[Part], list[str]]:
        for place in self.program.placeholders:
            self.made[place] = self.graph.placeholder(place.name)
            self.made[place].meta["val"] = value(place)
        self._lift_weights()
        parts: list[Part] = []
        for item in self.items:
            if isinstance(item, fx.Node):
                self.outside(item)
                continue
            part = _PartMaker(self, item, f"engine_{len(parts)}").make()
            if part is not None:
                parts.append(part)
        if not parts:
            raise ThresherError(
                "No stretch of the program is for a TensorRT engine: fewer than "
                f"{SMALLEST} of PyTorch's own operators follow each other. Use target='inductor'."
            )
        results = torch.fx.node.map_arg(self.program.output_node.args[0], self.outside)
        self.graph.output(results)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        root = torch.nn.Module()
        for part in parts:
            setattr(root, part.name, torch.nn.Identity())
        return fx.GraphModule(root, self.graph), parts, self.weights

    def _lift_weights(self) -> None:
        places: dict[str, fx.Node] = {}
        readers = [i for i in self.items if isinstance(i, fx.Node)] + [self.program.output_node]
        for node in (n for reader in readers for n in reader.all_input_nodes if n.op == "get_attr"):
            name = str(node.target)
            if name not in places:
                places[name] = self.graph.placeholder(name)
                places[name].meta["val"] = value(node)
                self.weights.append(name)
            self.made[node] = places[name]

    def outside(self, node: fx.Node) -> fx.Node:
        """A node of the program in the outer graph, put there with the sizes it needs where it is not yet."""
        if node not in self.made:
            self.made[node] = self._size_of_input(node) or self.graph.node_copy(node, self.outside)
            self.made[node].meta.setdefault("val", value(node))
        return self.made[node]

    def _size_of_input(self, node: fx.Node) -> fx.Node | None:
        """A size that one of the program's own inputs is, or has."""
        if not is_size(node) or isinstance(value(node), int):
            return None
        for place in self.program.placeholders:
            if str(value(place)) == str(value(node)):
                return self.made[place]
        where = dimension_of(value(node), self.program.placeholders)
        if where is None:
            return None
        return self.graph.call_function(torch.ops.aten.sym_size.int, (self.made[where[0]], where[1]))

    def depends_on(self, node: fx.Node) -> set[fx.Node]:
        """The tensors whose sizes have to be read outside for a size; none where the program's inputs have it."""
        if node in self.program.placeholders or not is_size(node):
            return set() if is_size(node) else {node}
        known = str(value(node)) in {str(value(p)) for p in self.program.placeholders}
        if isinstance(value(node), int) or known or dimension_of(value(node), self.program.placeholders):
            return set()
        return set().union(*(self.depends_on(a) for a in node.all_input_nodes))


class _PartMaker:
    """Makes one part's Program, and its call in the outer graph."""

    def __init__(self, cutter: _Cutter, run: Run, name: str):
        self.cutter, self.run, self.name = cutter, run, name
        self.graph = fx.Graph()
        self.weights: dict[str, Any] = {}
        self.made: dict[fx.Node, fx.Node] = {}
        self.given: list[tuple[fx.Node, fx.Node]] = []  # inside, outside
        self.sizes: dict[str, fx.Node] = {}
        self.own = set(run.nodes)

    def make(self) -> Part | None:
        results = [n for n in self.run.nodes if self._read_outside(n)]
        if not results:
            return None  # nothing reads it
        self.last: fx.Node | None = None
        for node in self.run.nodes:
            for given in node.all_input_nodes:
                if given not in self.own and given.op != "get_attr" and not is_size(given):
                    self._tensor(given)
        for node in self.run.nodes:
            self.made[node] = self.graph.node_copy(node, self._inside)
            self.made[node].meta = dict(node.meta)
        self.graph.output(tuple(self.made[r] for r in results))
        module = lazy_module(fx.Graph())
        for name, weight in self.weights.items():
            module.register_buffer(name, weight.tensor, persistent=False)
        module.graph = self.graph
        names = [inner.name for inner, _ in self.given]
        program = Program(module, self.weights, names, mask_name=self.cutter.program.mask_name)
        program.clean()
        call = self.cutter.graph.call_module(self.name, tuple(o for _, o in self.given))
        call.meta["val"] = tuple(value(r) for r in results)
        for index, result in enumerate(results):
            got = self.cutter.graph.call_function(operator.getitem, (call, index))
            got.meta = dict(result.meta)
            self.cutter.made[result] = got
        return Part(self.name, program)

    def _read_outside(self, node: fx.Node) -> bool:
        """Whether something that is not of this stretch needs a node's tensor, be it for its size only."""
        if isinstance(value(node), (tuple, list)):
            return False  # its members are nodes of the same stretch
        return any(self._needs(user, node) for user in node.users if user not in self.own)

    def _needs(self, user: fx.Node, node: fx.Node) -> bool:
        if not is_size(user):
            return True
        return node in self.cutter.depends_on(user)

    def _tensor(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            self.made[node] = self._placeholder(node.name, value(node), self.cutter.outside(node))
        return self.made[node]

    def _placeholder(self, name: str, known: Any, outside: fx.Node) -> fx.Node:
        first = next(iter(self.graph.nodes), None)
        with (
            self.graph.inserting_after(self.last)
            if self.last is not None
            else self.graph.inserting_before(first if first is not None else self.graph._root)
        ):
            place = self.graph.placeholder(name)
        place.meta["val"] = known
        self.given.append((place, outside))
        self.last = place
        return place

    def _inside(self, node: fx.Node) -> fx.Node:
        if node in self.made:
            return self.made[node]
        if node.op == "get_attr":
            name = str(node.target)
            self.weights[name] = self.cutter.program.weights[name]
            self.made[node] = self.graph.create_node("get_attr", name)
            self.made[node].meta = dict(node.meta)
        elif is_size(node):
            self.made[node] = self._size(node)
        else:
            raise ThresherError(f"{node.name} is read by an engine before it is made.")
        return self.made[node]

    def _size(self, node: fx.Node) -> fx.Node:
        """A size within the part: a dimension of a tensor it is given, else the length of one made for it."""
        known = value(node)
        if not isinstance(known, (torch.SymInt, int)):
            raise ThresherError(
                f"{node.name} is a {type(known).__name__} that only a call decides, and an engine takes tensors alone."
            )
        where = dimension_of(known, [inner for inner, _ in self.given])
        if where is None:
            place = self.sizes.get(str(known))
            if place is None:
                mode = self.cutter.program.fake_mode()
                with mode:
                    fake = torch.empty(known, dtype=torch.int32)
                length = self.cutter.outside(node)
                device = self._device()
                made = self.cutter.graph.call_function(
                    torch.ops.aten.empty.memory_format, ([length],), {"dtype": torch.int32, "device": device}
                )
                made.meta["val"] = fake
                place = self.sizes[str(known)] = self._placeholder(f"{node.name}_length", fake, made)
            where = (place, 0)
        found = self.graph.call_function(torch.ops.aten.sym_size.int, where)
        found.meta["val"] = known
        return found

    def _device(self) -> torch.device:
        tensors = [t for n in self.run.nodes for t in tensors_of(value(n))]
        return tensors[0].device if tensors else torch.device("cpu")
