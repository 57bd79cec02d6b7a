"""A graph's arguments as Dynamo passes them: the real ones while it compiles, and what it calls in the graph's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from thresher.runtime.session import Session

from . import sessions, side_graphs
from .alike.further import Further
from .graph import sharded
from .graph.size_guards import SizeGuards


def real_inputs(gm: fx.GraphModule, roles: Sequence[str]) -> list[Any] | None:
    """The caller's real tensors and sizes for this call, or None when they are not at hand."""
    found = []
    for node, role in zip([n for n in gm.graph.nodes if n.op == "placeholder"], roles):
        if not role.startswith("input:"):
            continue
        argument = node.meta.get("grapharg")
        example = argument.example if argument is not None else None
        if isinstance(example, torch.SymInt):
            example = int(example.node.hint)
        if example is None or isinstance(example, torch._subclasses.fake_tensor.FakeTensor):
            return None
        found.append(example)
    return found


def as_function(
    session: Session, roles: Sequence[str], gm: fx.GraphModule, further: Further | None = None
) -> Callable[..., list[Any]]:
    """A callable of a graph's arguments. roles: what each of them is. gm: the graph as Dynamo gave it. further: what the
    layers bring that a short model lacks."""
    inputs = [i for i, role in enumerate(roles) if role.startswith("input:")]
    weights = [
        (i, role.removeprefix("weight:")) for i, role in enumerate(roles) if role.startswith("weight:")
    ]

    known = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    parts, sizes = sharded.Parts(), SizeGuards([known[i] for i in inputs])

    def call(*arguments: Any) -> list[Any]:
        side_graphs.called()
        live = parts.of({fqn: arguments[i] for i, fqn in weights})
        given = [arguments[i] for i in inputs]
        if further is not None:
            live, given = {**live, **further.live()}, [*given, *further.inputs()]
        results = session(given, live)
        sessions.tell(session, results, live, given, sizes)
        return results if further is None else further.split(results)

    return call
