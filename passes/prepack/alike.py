"""A packed body whose layers are alike is traced with few of them and continued, as a captured program is (`deepen`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from thresher.graph import names
from thresher.graph.deepen import Layers, Unlike, deepen
from thresher.graph.program import Program

from .frontier import Frontier


@dataclass
class Twins:
    """Nodes of further layers, and for each the node of the last traced layer that it is like.

    layers: None where every node is traced. places: of each node of a layer, its layer and a name for its place there.
    """

    layers: Layers | None = None
    of: dict[fx.Node, fx.Node] = field(default_factory=dict)
    layer: dict[fx.Node, int] = field(default_factory=dict)
    places: dict[fx.Node, tuple[int, str]] = field(default_factory=dict)

    @property
    def by_twin(self) -> dict[fx.Node, list[fx.Node]]:
        """The further layers' nodes of each that stands for them."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node, twin in self.of.items():
            found.setdefault(twin, []).append(node)
        return found


def twins(program: Program, frontier: Frontier, leaving: Sequence[fx.Node]) -> Twins:
    """The further layers' nodes of a program whose layers are alike, as far as packing sees; none of any other."""
    layers: Layers | None = program.alike
    if layers is None or frontier.islands:
        return Twins()
    blocks: dict[int, list[fx.Node]] = {}
    for node in program.nodes():
        for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
            found = layers.of(names.path(str(path)))
            if found is not None:
                blocks.setdefault(found[0], []).append(node)
                break
    made, last = Twins(layers), blocks.get(layers.kept - 1, [])
    made.places = {n: (index, f"n{at}") for index, block in blocks.items() for at, n in enumerate(block)}
    axes = frontier.axes
    for index in layers.further:
        block = blocks.get(index, [])
        if list(map(_written, block)) != list(map(_written, last)):
            return Twins()
        for node, twin in zip(block, last):
            same = (node in axes) == (twin in axes) and (node not in axes or axes[node] == axes[twin])
            if not same or frontier.visibilities.get(node) != frontier.visibilities.get(twin):
                return Twins()
            made.of[node], made.layer[node] = twin, index
    shown = set(leaving)
    if any(made.of[n] not in shown for n in leaving if n in made.of):
        return Twins()
    return made


def _written(node: fx.Node) -> str:
    """A call as it is written, but for what it reads."""
    return str((node.target, fx.map_arg((node.args, dict(node.kwargs)), lambda _: None)))


def continued(
    body: Program, program: Program, found: Twins, entering: Sequence[fx.Node], leaving: Sequence[fx.Node]
) -> Program:
    """The body of all layers from that of few, its results in the order of `leaving`. entering: nodes behind its first
    inputs. Raises Unlike."""
    layers = found.layers
    assert layers is not None
    held = {w.fqn: w.tensor for w in program.weights.values()}

    def tensor(index: int, name: str) -> torch.Tensor:
        fqn = layers.named(index, name)
        if fqn not in held:
            raise Unlike(f"The program has no weight {fqn}.")
        return held[fqn]

    inputs = [found.places.get(n) for n in entering]
    whole = deepen(body, layers, [*inputs, *[None] * (len(body.placeholders) - len(inputs))], tensor)
    first = [n for n in leaving if n not in found.of]
    twins_of_leaving = {found.of[n] for n in leaving if n in found.of}
    numbers = [i for i, n in enumerate(first) if n in twins_of_leaving]
    made = list(whole.outputs)
    if len(made) != len(first) + len(layers.further) * len(numbers):
        raise Unlike("A layer's results are not its own.")

    def place(node: fx.Node) -> int:
        if node not in found.of:
            return first.index(node)
        within = numbers.index(first.index(found.of[node]))
        return len(first) + (found.layer[node] - layers.kept) * len(numbers) + within

    whole.output_node.args = (tuple(made[place(n)] for n in leaving),)
    whole.graph_module.recompile()
    return whole
