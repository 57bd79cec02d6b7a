"""Traces a program anew (`tracing.trace`) and lets a pass decide what each node's value is: see `replay`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thresher.graph.capture import assemble
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.tracing import trace


def retrace(
    program: Program,
    replay: Callable[[dict[fx.Node, Any], Mapping[str, Any]], Sequence[Any]],
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Replace a program's graph by the trace of `replay`.

    replay: takes the values of placeholders and weights by node, and those of the extra inputs by name;
        returns the results. extra: fakes of inputs to append, by name.
    """
    extra = extra or {}
    places = program.placeholders
    weights = [n for n in program.graph.nodes if n.op == "get_attr"]
    fakes = [value(n) for n in places] + list(extra.values()) + [value(n) for n in weights]
    names = [*program.input_names, *extra]

    def run(*given: Any) -> tuple[Any, ...]:
        env = dict(zip([*places, *weights], [*given[: len(places)], *given[len(names) :]]))
        return tuple(replay(env, dict(zip(extra, given[len(places) :]))))

    with program.fake_mode(), torch.no_grad(), fx.traceback.preserve_node_meta():
        traced = trace(run, fakes)
    read = [program.weights[str(n.target)] for n in weights]
    held = {len(names) + i: (w.fqn, w.tensor) for i, w in enumerate(read)}
    fresh = assemble(traced, names, held, list(program.notes))
    known = {w.fqn: w for w in read}
    program.weights = {name: known.get(w.fqn, w) for name, w in fresh.weights.items()}
    program.graph_module, program.input_names = fresh.graph_module, fresh.input_names
