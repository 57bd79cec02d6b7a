"""Which provider each operator of ours will run with, as sentences for the report.

The choice is made anew at every call; this asks it once for the sizes of the capture, so that a slow path
is known before anything runs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from thresher import ops
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of


def provider_notes(program: Program) -> list[str]:
    """One sentence for each operator and provider; for the reference it says why no faster one was taken."""
    found: Counter[tuple[str, str, str]] = Counter()
    with FakeTensorMode() as mode:
        for node in program.nodes():
            op = ops.of(node.target)
            if op is None:
                continue
            try:
                provider, passed = op.choose(*example_arguments(node, mode))
            except Exception as reason:  # an argument that has no example, say; the call itself will choose
                found[op.name, "unknown", f"its arguments have no example ({reason})"] += 1
                continue
            why = " ".join(f"Not {name}: {text}" for name, text in passed)
            found[op.name, provider.name, why] += 1
    return [_sentence(*key, calls) for key, calls in found.items()]


def example_arguments(node: fx.Node, mode: FakeTensorMode) -> list[Any]:
    """A call's arguments as fake tensors of the captured sizes, and constants."""
    return [_example(a, mode) for a in node.args]


def _example(argument: Any, mode: FakeTensorMode) -> Any:
    """A graph argument as a fake tensor of the captured sizes, or the constant."""
    if isinstance(argument, (list, tuple)):
        return [_example(a, mode) for a in argument]
    known = value(argument)
    if isinstance(known, torch.Tensor):
        size, stride = ([_number(n) for n in part] for part in (known.shape, known.stride()))
        return torch.empty_strided(size, stride, dtype=known.dtype, device=known.device)
    return _number(known) if isinstance(known, (torch.SymInt, torch.SymFloat, torch.SymBool)) else known


def _number(size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        return example_of(size)
    return size if isinstance(size, (int, float, bool)) else size.node.hint


def _sentence(op: str, provider: str, why: str, calls: int) -> str:
    times = "once" if calls == 1 else f"{calls} times"
    text = f"thresher::{op} runs {times} on {provider}."
    return f"{text} {why}" if why else text
