"""What a target is: it says whether it can take a Program, and turns it into something that runs."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program


@dataclass
class Lowered:
    """A lowered Program. `run(inputs, weights)` takes its placeholders' values and its weights' tensors
    in the order of `weights`, both as lists, and returns its results as a list.

    Weights stay arguments: whoever calls passes the live ones, so an edited weight is never stale.
    """

    target: str
    weights: list[str]
    run: Callable[[Sequence[Any], Sequence[torch.Tensor]], list[Any]]


class Target(abc.ABC):
    """A way to run a Program."""

    name: ClassVar[str]

    @abc.abstractmethod
    def supports(self, program: Program) -> str | None:
        """Why this target cannot take the program, as a sentence, or None."""

    @abc.abstractmethod
    def lower(self, program: Program) -> Lowered:
        """Build it."""


def lift_weights(program: Program) -> tuple[fx.GraphModule, list[str]]:
    """The graph with its weights as trailing placeholders, and their attribute names in that order."""
    copy = program.copy()
    graph = copy.graph
    lifted: dict[str, fx.Node] = {}
    last = copy.placeholders[-1] if copy.placeholders else None
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if str(node.target) in lifted:  # a pass read the same weight once more
            node.replace_all_uses_with(lifted[str(node.target)])
            graph.erase_node(node)
            continue
        with (
            graph.inserting_after(last)
            if last is not None
            else graph.inserting_before(next(iter(graph.nodes)))
        ):
            place = graph.placeholder(str(node.target))
        place.meta = {k: v for k, v in node.meta.items() if k == "val"}
        node.replace_all_uses_with(place)
        graph.erase_node(node)
        lifted[str(node.target)] = last = place
    return fx.GraphModule(torch.nn.Module(), graph), list(lifted)


def fake_inputs(module: fx.GraphModule) -> list[Any]:
    """The fake tensors and sizes of a graph's placeholders, in order."""
    return [value(n) for n in module.graph.nodes if n.op == "placeholder"]
