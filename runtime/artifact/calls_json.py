"""A program as JSON with all that belongs to it: its packed layout, and the plan by which calls get other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from thresher.graph.call_plan import CallPlan, Choice, Shortened
from thresher.graph.program import Program

from .layout_json import check_places, decode_layout, decode_rule, encode_layout, encode_rule
from .program_json import decode, encode

Hold = Callable[[torch.Tensor], int]


def encode_all(program: Program, hold: Hold) -> dict[str, Any]:
    """The program, its layout and its plan as a JSON value; `hold` as in `encode`."""
    found: dict[str, Any] = {"body": encode(program, hold)}
    if program.packing is not None:
        found["layout"] = encode_layout(program.packing, hold)
    if program.calls is not None:
        found["plan"] = _encode_plan(program.calls, hold)
    return found


def decode_all(data: Mapping[str, Any], tensors: list[torch.Tensor]) -> Program:
    """The program that `encode_all` wrote."""
    program = decode(data["body"], tensors)
    if "layout" in data:
        program.packing = decode_layout(data["layout"], tensors)
        check_places(program.packing, program)
    if "plan" in data:
        program.calls = _decode_plan(data["plan"], tensors)
    return program


def _encode_plan(plan: CallPlan, hold: Hold) -> dict[str, Any]:
    return {
        "choices": {
            name: {
                "made": list(choice.made),
                "inputs": encode(choice.inputs, hold) if choice.inputs is not None else None,
                "decide": encode_rule(choice.decide, hold),
            }
            for name, choice in plan.choices.items()
        },
        "extra_inputs": plan.extra_inputs,
        "extra_outputs": plan.extra_outputs,
        "shortened": [[i, asdict(s)] for i, s in plan.shortened.items()],
        "scored": [*map(list, plan.scored.items())],
        "published": [*map(list, plan.published.items())],
        "behind": [encode_rule(cut, hold) for cut in plan.behind],
    }


def _decode_plan(data: Mapping[str, Any], tensors: list[torch.Tensor]) -> CallPlan:
    return CallPlan(
        {
            name: Choice(
                tuple(choice["made"]),
                decode(choice["inputs"], tensors) if choice["inputs"] is not None else None,
                decode_rule(choice["decide"], tensors),
            )
            for name, choice in data["choices"].items()
        },
        list(data["extra_inputs"]),
        list(data["extra_outputs"]),
        {i: Shortened(**s) for i, s in data["shortened"]},
        dict(data["scored"]),
        dict(data["published"]),
        [decode_rule(cut, tensors) for cut in data["behind"]],
    )
