"""Gives a decoded program's nodes their fake tensors and sizes again, which a file does not hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from thresher.graph.program import Program

from . import expressions
from .program_json import LEAST


def materialise(program: Program) -> Program:
    """Give every node of a decoded program its fake tensor or size again, in place; returns it."""
    return _materialise(program, ends_only=False)


def materialise_for_compiler(program: Program) -> Program:
    """As `materialise`; only inputs and weights where a compiler that traces for itself needs no more.

    A choice that is made on the graph before, few-token linears, asks for sizes only where sizes are fixed.
    """
    return _materialise(program, ends_only=not program.graph_module.meta.get("fixed_linears", True))


def _materialise(program: Program, ends_only: bool) -> Program:
    module = program.graph_module
    if "symbols" not in module.meta:
        return program
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols = {name: _symbol(mode, name, facts) for name, facts in module.meta["symbols"].items()}
    with mode:
        fakes = [_fake(p.meta["saved"], symbols) for p in program.placeholders]
    with mode, torch.no_grad():
        if ends_only:
            for node, fake in zip(program.placeholders, fakes, strict=True):
                node.meta["val"] = fake
            for node in program.graph.nodes:
                if node.op == "get_attr":
                    node.meta["val"] = _weight_fake(mode, getattr(module, str(node.target)))
            return program
        _Fakes(module, mode).run(*fakes)
    del module.meta["symbols"]
    for place in program.placeholders:
        del place.meta["saved"]
    return program


class _Fakes(fx.Interpreter):
    """Runs a graph on fakes and keeps what each node gave."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode):
        super().__init__(module)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            result = _weight_fake(self.mode, getattr(self.module, str(n.target)))
        else:
            result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result


def _weight_fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    return mode.from_tensor(tensor.detach(), static_shapes=True)


def _symbol(mode: FakeTensorMode, name: str, facts: dict[str, Any]) -> Any:
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    example = torch.empty(max(2, facts["hint"]), device="meta")
    source = ConstantSource(facts.get("source", name))
    size: Any = mode.from_tensor(example, symbolic_context=context, source=source).shape[0]
    env = mode.shape_env
    assert env is not None
    if facts["min"] < 0:  # a number, and no size
        upper = int_oo if facts["max"] is None else facts["max"]
        lower = -int_oo if facts["min"] <= LEAST else facts["min"]
        env.var_to_range[size.node.expr] = ValueRanges(lower, upper)
    elif facts["max"] is not None or facts["min"] > 2:
        known = env.var_to_range[size.node.expr]
        env.var_to_range[size.node.expr] = ValueRanges(
            max(known.lower, facts["min"]), known.upper if facts["max"] is None else facts["max"]
        )
    return size


def _fake(saved: Any, symbols: dict[str, Any]) -> Any:
    if not isinstance(saved, dict):
        return saved
    if "size" in saved:
        return expressions.evaluate(saved["size"], symbols)
    shape, stride = (
        [expressions.evaluate(s, symbols) for s in part] for part in (saved["shape"], saved["stride"])
    )
    return torch.empty_strided(
        shape, stride, dtype=getattr(torch, saved["dtype"]), device=torch.device(saved["device"])
    )
