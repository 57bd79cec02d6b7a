"""What a target is: what it can do, as a value (`Runtime`), and how a Program becomes something that runs (`Target`).

A target is a module that offers `Runtime`s and a line for each in `lowering.catalog`. Whatever depends on the
target asks for an ability and never for a name.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from thresher.engine_report import EngineReport
from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.graph.program import Program


@dataclass
class Lowered:
    """A lowered Program. `run(inputs, weights)` takes its placeholders' values and its weights' tensors
    in the order of `weights`, both as lists, and returns its results as a list.

    Weights stay arguments: whoever calls passes the live ones, so an edited weight is never stale.
    engines: what was built for it, for the report. later: a program that runs plainly until its compiled form is ready
        (`inductor.later.Later`); None where it is ready. step: the `steps.program.Step` that `run` calls with inputs and
        weights, where it is one.
    """

    target: str
    weights: list[str]
    run: Callable[[Sequence[Any], Sequence[torch.Tensor]], list[Any]]
    engines: list[EngineReport] = field(default_factory=list)
    later: Any = None
    step: Any = None


class Target(abc.ABC):
    """A way to run a Program.

    fakes: where lowering reads fake tensors, which programs out of a file or a cache have to be given first: "all"
        nodes, the "ends" alone (inputs and weights, for a compiler that traces for itself), or "none".
    """

    name: ClassVar[str]
    fakes: ClassVar[str] = "all"

    @abc.abstractmethod
    def lower(self, program: Program) -> Lowered:
        """Build it. Raises ThresherError with the reason for a program that this target cannot take."""


NATIVE, DECOMPOSED, FALLBACK, REFUSED = "native", "decomposed", "fallback", "refused"
"""What becomes of a node: one operator of the target's; several of the same meaning; something that runs, and is
slower or larger than meant; nothing."""


@dataclass(frozen=True)
class Form:
    """How a target takes one operator of ours by itself, in place of the operator's plain form.

    account: for a node and the target, what becomes of it and why, the reason empty where it is native; None where
        this call takes the plain form. put: replaces a node, with what the target's conversion shares; a node that it
        leaves takes the plain form.
    """

    account: Callable[[fx.Node, Runtime], tuple[str, str] | None]
    put: Callable[[fx.Node, Any], None]


@dataclass(frozen=True)
class Runtime:
    """What a target can do.

    name: what users call it.
    operators: it runs whatever PyTorch does, our operators by their providers; else ATen, `forms` and plain forms.
    sizes: it takes numbers as inputs beside tensors, such as the sizes that Dynamo hands over.
    outside: why packing and unpacking happen around the target and not within it, a full sentence; empty where it
        can do both, or where `operators` leaves them to the session.
    segments: it has attention operators of its own that skip what causality and packing hide.
    added_masks: it fuses attention under masks that are added to the scores, and not under bool ones.
    gpu: it means kernels for GPUs.
    low_bit: which low-bit weights it multiplies by as they are: "nbits" (one product with integer codes),
        "fp4" (E2M1 codes), "fp4_activations" (E2M1 codes, where activations are rounded to them too).
    forms: by an operator's name, the target's own forms.
    refuses: why it cannot take a node of plain ATen, a full sentence, or None.
    lower: makes the Target that `thresher.compile` asks for, from the recipe's Inductor options, or the target's own
        (`options`), and torch.compile's mode; None for a target that only writes files.
    options: the names of options of its own, which stand beside "target" and not in the recipe.
    alone: it runs all of a model or raises; nothing else runs in its place a graph that it cannot take.
    peer: the `torch.compile` backend that a model runs by without Thresher, to compare with; None for eager alone.
    """

    name: str
    operators: bool = False
    sizes: bool = False
    outside: str = ""
    segments: bool = False
    added_masks: bool = False
    gpu: bool = False
    low_bit: frozenset[str] = frozenset()
    forms: Mapping[str, Form] = field(default_factory=dict)
    refuses: Callable[[fx.Node], str | None] = lambda node: None
    lower: Callable[[Mapping[str, Any], str | None], Target] | None = None
    peer: str | None = None
    options: frozenset[str] = frozenset()
    alone: bool = False


def lift_weights(program: Program) -> tuple[fx.GraphModule, list[str]]:
    """The graph with its weights as trailing placeholders, and their attribute names in that order."""
    copy = program.copy()
    graph = copy.graph
    lifted: dict[str, fx.Node] = {}
    last = copy.placeholders[-1] if copy.placeholders else None
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if str(node.target) in lifted:  # a pass read the same weight once more
            replace(node, lifted[str(node.target)], erase=True)
            continue
        with (
            graph.inserting_after(last)
            if last is not None
            else graph.inserting_before(next(iter(graph.nodes)))
        ):
            place = graph.placeholder(str(node.target))
        place.meta = {k: v for k, v in node.meta.items() if k == "val"}
        replace(node, place, erase=True)
        lifted[str(node.target)] = last = place
    return fx.GraphModule(torch.nn.Module(), graph), list(lifted)


def fake_inputs(module: fx.GraphModule) -> list[Any]:
    """The fake tensors and sizes of a graph's placeholders, in order."""
    return [value(n) for n in module.graph.nodes if n.op == "placeholder"]
