"""Programs of a few operators, captured from a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from thresher.graph import capture
from thresher.graph.program import Program
from thresher.kernels import catalog

catalog.load()


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any], weights: Mapping[str, torch.Tensor]):
        super().__init__()
        self.function = function
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)
        self.names = list(weights)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, n) for n in self.names))


def program(
    function: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor] | None = None,
    dynamic: Mapping[str, Mapping[int, Any]] | None = None,
) -> Program:
    """The Program of `function(*inputs, *weights)`. dynamic: the dimensions that vary, by input."""
    shapes = tuple(dict((dynamic or {}).get(name, {})) or None for name in inputs)
    module = _Function(function, weights or {})
    exported = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
    found = capture.from_export(exported)
    found.input_names = list(inputs)
    return found
