"""AOTInductor: a Program as machine code in one package, which needs neither Python tracing nor Inductor to run.

Works for CPUs; for a GPU the package must be built where that GPU is. Weights stay arguments, as in every
target, so the package holds code alone.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.errors import ThresherError
from thresher.graph.nodes import value
from thresher.graph.program import Program

from ..target import Lowered, Target, lift_weights


class AOTInductor(Target):
    """Compiles ahead of time to a shared library that needs no Python at call time; see `package`."""

    name = "aoti"

    def lower(self, program: Program) -> Lowered:
        with tempfile.TemporaryDirectory() as folder:
            return load(package(program, Path(folder) / "compiled.pt2").read_bytes(), program)


def machine() -> dict[str, str]:
    """What machine code depends on: it runs only where all of these are the same."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def unsupported(program: Program) -> str | None:
    """Why no package can be built for a program, or None."""
    for node in program.placeholders:
        known = value(node)
        if isinstance(known, torch.Tensor) and known.is_cuda and not torch.cuda.is_available():
            return "AOTInductor compiles for the GPU it runs on, and torch sees none here."
    if program.fake_mode() is None:
        return "The program has no fake tensors, so its shapes are unknown."
    return None


def package(program: Program, path: Path) -> Path:
    """Compile a program into a package at `path` (.pt2). Takes as long as an Inductor compilation."""
    from torch._inductor import aoti_compile_and_package

    reason = unsupported(program)
    if reason is not None:
        raise ThresherError(f"No machine code was made: {reason}")
    module, _ = lift_weights(program)
    examples, shapes, sizes = _examples(module)
    wrapped = _Positional(module, sizes)
    with torch.no_grad():
        exported = torch.export.export(wrapped, (examples,), dynamic_shapes=(shapes,), strict=False)
        aoti_compile_and_package(exported, package_path=str(path))
    return path


def load(code: bytes, program: Program) -> Lowered:
    """Machine code as a lowered program. Executes it: the caller must trust its origin."""
    from torch._inductor import aoti_load_package

    _, names = lift_weights(program)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "compiled.pt2"
        file.write_bytes(code)
        runner = aoti_load_package(str(file))

    def run(inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
        given = [torch.empty(x, dtype=torch.uint8) if isinstance(x, int) else x for x in inputs]
        with torch.no_grad():
            results = runner([*given, *weights])
        return list(results) if isinstance(results, (tuple, list)) else [results]

    return Lowered(AOTInductor.name, names, run)


class _Positional(torch.nn.Module):
    """Takes one list, so that any number of inputs has one dynamic_shapes entry.

    A package takes tensors only: a size is passed as the shape of an empty byte tensor.
    """

    def __init__(self, module: torch.fx.GraphModule, sizes: set[int]):
        super().__init__()
        self.module, self.sizes = module, sizes

    def forward(self, arguments: list[Any]) -> Any:
        given = [a.shape[0] if i in self.sizes else a for i, a in enumerate(arguments)]
        return self.module(*given)


def _examples(module: torch.fx.GraphModule) -> tuple[list[torch.Tensor], list[Any], set[int]]:
    """Example arguments of the sizes captured, which of their dimensions vary, and which stand for sizes."""
    examples: list[torch.Tensor] = []
    shapes: list[Any] = []
    sizes: set[int] = set()
    for index, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
        known = value(node)
        if not isinstance(known, torch.Tensor):
            sizes.add(index)
            known = torch.empty(0, dtype=torch.uint8).new_empty(_hint(known))
            examples.append(known)
            shapes.append({0: torch.export.Dim.DYNAMIC})
            continue
        examples.append(torch.zeros([_hint(s) for s in known.shape], dtype=known.dtype, device=known.device))
        moving = [i for i, s in enumerate(known.shape) if isinstance(s, torch.SymInt)]
        shapes.append({i: torch.export.Dim.DYNAMIC for i in moving} or None)
    return examples, shapes, sizes


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
