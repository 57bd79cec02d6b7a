"""FX to TensorRT: a Program cut into parts that become engines and parts that stay in PyTorch.

Operators of ours stay in PyTorch, where they find their own kernels; what lies between them goes to
torch-tensorrt (or torch-tensorrt-rtx, which is imported under the same name). The cutting is tested; building the
engines needs a GPU and is **not verified** by Thresher's tests: prefer `lowering.tensorrt`, whose engines are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from thresher.errors import MissingDependencyError
from thresher.ops import NAMESPACE
from thresher.program import Program

from .target import Lowered, Target, fake_inputs, lift_weights

ENGINE, TORCH = "engine", "torch"
_SMALLEST = 3  # nodes; fewer are not worth entering an engine for


@dataclass
class Part:
    """One part: its name in the cut module, where it runs, and its operators in order."""

    name: str
    where: str
    operators: list[str]


def unavailable() -> str | None:
    """Why no engine can be built from a graph here, or None. A present package is still unverified."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "torch-tensorrt is not installed."
    return (
        None
        if torch.cuda.is_available()
        else "torch-tensorrt builds on the GPU it builds for; torch sees none."
    )


def cut(module: fx.GraphModule) -> tuple[fx.GraphModule, list[Part]]:
    """The module as a chain of submodules, each wholly for an engine or wholly for PyTorch.

    A part ends where the kind of operator changes; short stretches between two operators of ours stay with them.
    """
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    kinds = [TORCH if _ours(n) else ENGINE for n in nodes]
    runs: list[list[int]] = []
    for index, kind in enumerate(kinds):
        if runs and kinds[runs[-1][-1]] == kind:
            runs[-1].append(index)
        else:
            runs.append([index])
    for run in runs:
        if kinds[run[0]] == ENGINE and len(run) < _SMALLEST:
            for index in run:
                kinds[index] = TORCH
    part, numbers = -1, {}
    for index, node in enumerate(nodes):
        if index == 0 or kinds[index] != kinds[index - 1]:
            part += 1
        numbers[node] = part
    where = {numbers[n]: kinds[i] for i, n in enumerate(nodes)}
    divided = split_module(module, module, lambda n: numbers.get(n, 0), keep_original_order=True)
    parts = []
    for number, kind in where.items():
        name = f"submod_{number}"
        inner = getattr(divided, name)
        parts.append(Part(name, kind, [str(n.target) for n in inner.graph.nodes if n.op == "call_function"]))
    return divided, parts


class TorchTensorRT(Target):
    """build: makes an engine of one part from its example inputs; torch-tensorrt's compiler by default."""

    name = "torch-tensorrt"

    def __init__(self, build: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]] | None = None):
        self._build = build

    def supports(self, program: Program) -> str | None:
        return None if self._build is not None else unavailable()

    def lower(self, program: Program) -> Lowered:
        build = self._build or _compiler()
        module, names = lift_weights(program)
        divided, parts = cut(module)
        examples = _part_inputs(divided, fake_inputs(module))
        for part in parts:
            if part.where == ENGINE:
                setattr(divided, part.name, _Engine(build(getattr(divided, part.name), examples[part.name])))

        def run(inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(divided(*inputs, *weights))

        return Lowered(self.name, names, run)


class _Engine(torch.nn.Module):
    def __init__(self, call: Callable[..., Any]):
        super().__init__()
        self._call = call

    def forward(self, *inputs: Any) -> Any:
        return self._call(*inputs)


def _ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE


def _part_inputs(divided: fx.GraphModule, fakes: Sequence[Any]) -> dict[str, list[Any]]:
    """Each part's fake inputs, found by running the chain on fakes."""
    found: dict[str, list[Any]] = {}

    class Watch(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            found[str(target)] = list(args)
            return super().call_module(target, args, kwargs)

    mode = next(f.fake_mode for f in fakes if isinstance(f, torch._subclasses.fake_tensor.FakeTensor))
    with mode, torch.no_grad():
        Watch(divided).run(*fakes)
    return found


def _compiler() -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise MissingDependencyError("torch-tensorrt", "gpu", "Building engines from a graph")
    import torch_tensorrt

    def build(part: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return torch_tensorrt.dynamo.convert_module(part, list(inputs))  # unverified: needs a GPU

    return build
