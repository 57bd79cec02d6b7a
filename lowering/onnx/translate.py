"""A program of plain ATen and ONNX's own nodes through torch's exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from thresher.errors import ThresherError
from thresher.graph.nodes import value
from thresher.graph.program import Program

from ..decompose import number_read


class _Call(torch.nn.Module):
    """A program as a module that torch.export takes."""

    def __init__(self, program: Program):
        super().__init__()
        weights = {
            n: torch.nn.Parameter(w.tensor.detach(), requires_grad=False) for n, w in program.weights.items()
        }
        self.module = fx.GraphModule(weights, program.copy().graph)

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)


class NumberReadError(ThresherError):
    """The program reads a number that is given around it, and a file takes tensors alone."""


def translate(program: Program, opset: int) -> Any:
    """A program of plain ATen and ONNX's own nodes as an onnx_ir model."""
    examples: list[Any] = []
    shapes: list[Any] = []
    for place in program.placeholders:
        known = value(place)
        if not isinstance(known, torch.Tensor):
            raise NumberReadError(number_read(place))
        sizes = [int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in known.shape]
        examples.append(torch.zeros(sizes, dtype=known.dtype))
        moving = [i for i, s in enumerate(known.shape) if isinstance(s, torch.SymInt)]
        shapes.append({i: torch.export.Dim.DYNAMIC for i in moving} or None)
    with _quiet(), torch.no_grad():
        exported = torch.export.export(
            _Call(program), tuple(examples), dynamic_shapes=(tuple(shapes),), strict=False
        )
        result = torch.onnx.export(
            exported, dynamo=True, opset_version=opset, optimize=False, verbose=False,
            input_names=program.input_names, custom_translation_table=_translations(),
        )  # fmt: skip
    assert result is not None
    return result.model


def _translations() -> dict[Any, Any]:
    """Operators that torch's exporter does not know."""
    from onnxscript import opset23

    op: Any = opset23  # its type stubs know scripts, not plain calls

    def sort_stable(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = x.shape[dim] if x.shape is not None else None
        if isinstance(size, int):
            count = op.Constant(value_ints=[size])
        else:
            count = op.Reshape(
                op.Gather(op.Shape(x), op.Constant(value_int=dim)), op.Constant(value_ints=[1])
            )
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)  # equal values keep their order

    return {torch.ops.aten.sort.stable: sort_stable}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about deprecated parts of torch itself, and about packages nobody asked for."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
