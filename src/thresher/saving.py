"""What is saved of a compiled model: its weights as they are at that moment, and what its results are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher.runtime.artifact.fakes import materialise

from .graph.call_rules import Rule
from .graph.packed_layout import Counted
from .graph.program import Program, Weight


def names_of(result: Any, results: Sequence[Any]) -> list[str]:
    """The place of each of a graph's results in what the model returned: `logits`, `past_key_values.0.keys`."""
    places: dict[int, str] = {}
    _name(result, "", places)
    return [places.get(id(r), f"output_{i}") for i, r in enumerate(results)]


def _name(value: Any, path: str, places: dict[int, str], depth: int = 0) -> None:
    if isinstance(value, torch.Tensor):
        places.setdefault(id(value), path or "output")
    elif depth < 6:
        if isinstance(value, Mapping):
            parts = list(value.items())
        elif isinstance(value, (list, tuple)):
            parts = list(enumerate(value))
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            parts = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
        else:
            parts = []
        for key, part in parts:
            _name(part, f"{path}.{key}" if path else str(key), places, depth + 1)


def current(program: Program, live: Mapping[str, torch.Tensor]) -> Program:
    """The program with the model's weights as they are now, packed ones recomputed where needed."""
    copy = materialise(program).copy()
    for name, weight in list(copy.weights.items()):
        tensor = _now(weight, live)
        copy.weights[name] = Weight(copy.weights[name].fqn, tensor)
        copy.graph_module._buffers[name] = tensor
    layout = program.packing
    if layout is not None:
        parts = {n: getattr(layout, n) for n in ("prologue", "epilogue", "padded")}
        parts = {n: current(p, live) if p is not None else None for n, p in parts.items()}
        arguments = [_counted(a, live) for a in layout.arguments]
        copy.packing = dataclasses.replace(layout, arguments=arguments, **parts)
    if program.calls is not None:
        choices = {
            name: dataclasses.replace(c, inputs=current(c.inputs, live)) if c.inputs is not None else c
            for name, c in program.calls.choices.items()
        }
        copy.calls = dataclasses.replace(program.calls, choices=choices)
    return copy


def _now(weight: Weight, live: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A weight as it follows from the live ones. One that cannot be computed anew is as the last call checked it."""
    if weight.source and weight.derive is not None and all(fqn in live for fqn in weight.source):
        with torch.no_grad():
            return weight.derive(*(live[fqn] for fqn in weight.source))
    return weight.tensor if weight.source else live.get(weight.fqn, weight.tensor)


def _counted(argument: Any, live: Mapping[str, torch.Tensor]) -> Any:
    rule = argument.of if isinstance(argument, Counted) else None
    if not isinstance(rule, Rule) or rule.program is None:
        return argument
    return Counted(dataclasses.replace(rule, program=current(rule.program, live)))
