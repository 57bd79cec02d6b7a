"""Engines by torch-tensorrt's converters (or torch-tensorrt-rtx's, imported under the same name).

That a part becomes an engine this way is tested with torch-tensorrt-rtx behind stand-ins for the GPU that it asks for
(`tests/support/fake_cuda.py`); that such an engine runs needs a GPU and is **not verified**.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from thresher.errors import MissingDependencyError, ThresherError
from thresher.graph.nodes import value
from thresher.graph.program import Program

from .engine import Engine

PACKAGES = ("torch-tensorrt", "torch-tensorrt-rtx")


def package() -> Any:
    """torch_tensorrt. Raises MissingDependencyError without it."""
    try:
        import torch_tensorrt
    except ImportError:
        raise MissingDependencyError("torch-tensorrt", "tensorrt", "Building engines from a graph") from None
    return torch_tensorrt


def build(program: Program, shapes: Mapping[str, Any]) -> tuple[Callable[..., Any], Engine]:
    """A part as a callable that runs its engine, and an account of it. Operators without a converter are an error."""
    tensorrt, started = package(), time.perf_counter()
    exported, specs = exported_part(program, shapes)
    with torch.no_grad():
        made = tensorrt.dynamo.compile(
            exported, arg_inputs=specs, min_block_size=1, require_full_compilation=True
        )
    left = in_pytorch(made)
    if left:
        raise ThresherError(
            f"torch-tensorrt has no converter for {', '.join(left)}. Use builder='onnx', or target='inductor'."
        )
    major, minor = torch.cuda.get_device_capability()
    account = Engine(
        "",
        f"SM{major}{minor}",
        *version(),
        bytes=0,
        seconds=time.perf_counter() - started,
        cached=False,
        promised={},
    )
    account.sites = {w.fqn: _said(w.tensor) for w in program.weights.values() if w.tensor.dim() == 2}
    return made, account


def serialize(program: Program, shapes: Mapping[str, Any], **options: Any) -> bytes:
    """A part as a serialized engine; options: as torch-tensorrt's
    `convert_exported_program_to_serialized_trt_engine` takes them."""
    package()
    from torch_tensorrt.dynamo._compiler import convert_exported_program_to_serialized_trt_engine as convert

    exported, specs = exported_part(program, shapes)
    return bytes(convert(exported, arg_inputs=specs, min_block_size=1, **options))


def exported_part(program: Program, shapes: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """A part by torch.export, and torch-tensorrt's description of its inputs."""
    tensorrt = package()
    examples, dims, specs = [], [], []
    for place, name in zip(program.placeholders, program.input_names, strict=True):
        fake = value(place)
        ends = shapes.get(name)
        sizes = list(ends[1]) if ends is not None else [int(s) for s in fake.shape]
        make = torch.rand if fake.dtype.is_floating_point else torch.zeros
        examples.append(make(sizes, dtype=fake.dtype, device=fake.device))
        moving = [d for d, s in enumerate(fake.shape) if not isinstance(s, int)]
        dims.append({d: torch.export.Dim.DYNAMIC for d in moving} or None)
        spec = (
            {"shape": sizes}
            if ends is None
            else {"min_shape": ends[0], "opt_shape": ends[1], "max_shape": ends[2]}
        )
        specs.append(tensorrt.Input(**spec, dtype=fake.dtype))
    copy = program.copy()
    module = torch.fx.GraphModule(copy.graph_module, copy.graph)  # whose forward has its arguments by name
    exported = torch.export.export(module, tuple(examples), dynamic_shapes=tuple(dims), strict=False)
    return exported, specs


def in_pytorch(module: torch.nn.Module) -> list[str]:
    """The operators that torch-tensorrt left to PyTorch in what it compiled."""
    graphs = [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = (n for m in graphs for n in m.graph.nodes if n.op == "call_function")
    return sorted({str(n.target) for n in calls if isinstance(n.target, torch._ops.OpOverload)
                   and n.target.namespace == "aten" and not str(n.target).startswith("aten.sym_")})  # fmt: skip


def version() -> tuple[str, str]:
    """The package that is installed, and its version."""
    for name in PACKAGES:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return PACKAGES[0], "of unknown version"


def _said(weight: torch.Tensor) -> str:
    return (
        f"{str(weight.dtype).removeprefix('torch.')} (as the graph has it; torch-tensorrt names no kernels)"
    )
