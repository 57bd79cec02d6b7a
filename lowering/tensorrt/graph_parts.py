"""FX to TensorRT: a Program cut into parts that become engines and parts that stay in PyTorch.

Operators of ours stay in PyTorch, where they find their own kernels; what lies between them goes to
torch-tensorrt (or torch-tensorrt-rtx, which is imported under the same name). The cutting is tested, and so is that
torch-tensorrt-rtx makes an engine of each part (`serialize`; on a machine without a GPU behind the stand-ins of
`tests/support/fake_cuda.py`). Loading and running such engines needs a GPU and is **not verified**.
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
from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of
from thresher.ops import NAMESPACE

from ..target import Lowered, Target, fake_inputs, lift_weights

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

    def lower(self, program: Program) -> Lowered:
        build = self._build or _compiler()
        divided, parts, names = prepare(program)
        examples = _part_inputs(divided, fake_inputs(divided))
        for part in parts:
            if part.where == ENGINE:
                setattr(divided, part.name, _Engine(build(getattr(divided, part.name), examples[part.name])))

        def run(inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(divided(*inputs, *weights))

        return Lowered(self.name, names, run)


def prepare(program: Program) -> tuple[fx.GraphModule, list[Part], list[str]]:
    """The program cut into parts, and its weights' names in the order of its trailing placeholders.

    Parts for engines hold their weights, which an engine folds: those of this moment. Sizes that vary are read
    from their tensors, since an engine takes no numbers.
    """
    module, names = lift_weights(program)
    divided, parts = cut(module)
    for part in parts:
        if part.where == ENGINE:
            node = next(n for n in divided.graph.nodes if n.op == "call_module" and n.target == part.name)
            _bind(node, getattr(divided, part.name), program, set(names))
    divided.recompile()
    return divided, parts, names


def serialize(
    part: fx.GraphModule, inputs: Sequence[Any], low: int = 1, high: int = 64, **options: Any
) -> bytes:
    """A part as a serialized engine. low, high: the range of each size that varies; built best for its example.

    options: as torch-tensorrt's `convert_exported_program_to_serialized_trt_engine` takes them.
    Raises MissingDependencyError without torch-tensorrt.
    """
    tensorrt = _package()
    from torch_tensorrt.dynamo._compiler import convert_exported_program_to_serialized_trt_engine as convert

    dims: dict[str, Any] = {}
    shapes, examples, specs = [], [], []
    for fake in inputs:
        sizes = [example_of(s) for s in fake.shape]
        varying = {d: str(s) for d, s in enumerate(fake.shape) if not isinstance(s, int)}
        shapes.append(
            {
                d: dims.setdefault(n, torch.export.Dim(f"size_{len(dims)}", min=low, max=high))
                for d, n in varying.items()
            }
        )
        ends = [[end if d in varying else s for d, s in enumerate(sizes)] for end in (low, high)]
        sizes = [min(max(s, low), high) if d in varying else s for d, s in enumerate(sizes)]
        make = torch.zeros if not fake.dtype.is_floating_point else torch.rand
        examples.append(make(sizes, dtype=fake.dtype, device=fake.device))
        one = (
            {"shape": sizes}
            if not varying
            else {"min_shape": ends[0], "opt_shape": sizes, "max_shape": ends[1]}
        )
        specs.append(tensorrt.Input(**one, dtype=fake.dtype))
    exported = torch.export.export(part, tuple(examples), dynamic_shapes=tuple(shapes), strict=False)
    return bytes(convert(exported, arg_inputs=specs, min_block_size=1, **options))


def _bind(node: fx.Node, part: fx.GraphModule, program: Program, weights: set[str]) -> None:
    """Make weights a part's own, and sizes ones that it reads; `node` calls it."""
    places = [n for n in part.graph.nodes if n.op == "placeholder"]
    given = dict(zip(places, node.args, strict=True))
    tensors = [p for p in places if isinstance(value(p), torch.Tensor) and _name(given[p]) not in weights]
    start = next(n for n in part.graph.nodes if n.op != "placeholder")
    kept = []
    for place, argument in given.items():
        if _name(argument) in weights:
            weight = program.weights[_name(argument)].tensor.detach()
            part.register_buffer(place.name, weight, persistent=False)
            with part.graph.inserting_before(start):
                new = part.graph.get_attr(place.name)
        elif place in tensors:
            kept.append(argument)
            continue
        else:
            where = _dimension(value(place), tensors)
            if where is None:
                kept.append(argument)
                continue
            with part.graph.inserting_before(start):
                new = part.graph.call_function(torch.ops.aten.sym_size.int, where)
        new.meta = {"val": value(place)}
        replace(place, new, erase=True)
    node.args = tuple(kept)
    part.recompile()


def _dimension(size: Any, tensors: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """The tensor and dimension that has a symbolic size."""
    return next(((t, d) for t in tensors for d, s in enumerate(value(t).shape) if str(s) == str(size)), None)


def _name(argument: Any) -> str:
    return str(argument.target) if isinstance(argument, fx.Node) else ""


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


def _package() -> Any:
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise MissingDependencyError("torch-tensorrt", "gpu", "Building engines from a graph")
    import torch_tensorrt

    return torch_tensorrt


def _compiler() -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    tensorrt = _package()

    def build(part: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return tensorrt.dynamo.convert_module(part, list(inputs))  # unverified: needs a GPU

    return build
