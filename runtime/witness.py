"""What error to expect of a result of few numbers.

The largest error of a classifier's two logits is a matter of luck: one program may hit the truth by chance where another of
equal rounding does not. The values such a result is computed from are many, and their error is no matter of luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of
from thresher.lowering.target import Target

from .compare import outcome

FEW = 1024  # numbers, below which a result has a witness
_DEVIATIONS = 3.0  # the largest of few errors is seldom further out than that


def expected_errors(program: Program, inputs: Sequence[Any], plain: Target, raised: Target) -> list[float]:
    """For each result, three times the root mean square error of the nearest large value that it is computed from, over
    that value's root mean square; 0 for results without one."""
    nodes = [_witness(n) if n is not None else None for n in program.outputs]
    watched = program.copy()
    names = {n.name: n for n in watched.graph.nodes}
    kept = list(dict.fromkeys(n.name for n in nodes if n is not None))
    watched.output_node.args = ((*watched.outputs, *(names[k] for k in kept)),)
    watched.graph_module.recompile()
    first = len(nodes)
    low, true = (outcome(watched, inputs, target)[0].results[first:] for target in (plain, raised))
    found = {name: _DEVIATIONS * _relative(t, o) for name, o, t in zip(kept, low, true)}
    return [found[n.name] if n is not None else 0.0 for n in nodes]


def _witness(result: fx.Node) -> fx.Node | None:
    """The nearest floating-point value before a result that has many numbers, or the largest there is."""
    seen, queue, largest = {result}, [result], None
    while queue:
        node = queue.pop(0)
        known = value(node)
        if node.op == "call_function" and isinstance(known, torch.Tensor) and known.is_floating_point():
            if _count(known) >= FEW:
                return node
            if largest is None or _count(known) > _count(value(largest)):
                largest = node
        for source in node.all_input_nodes:
            if source not in seen and source.op != "get_attr":
                seen.add(source)
                queue.append(source)
    return largest


def _count(tensor: torch.Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= example_of(size)
    return count


def _relative(true: torch.Tensor, own: torch.Tensor) -> float:
    true, own = true.double(), own.double()
    finite = true.isfinite() & own.isfinite() & (true.abs() < 1e30)  # additive masks hold the least number
    return float((own - true)[finite].norm() / true[finite].norm().clamp_min(1e-30))
