"""Thresher: graph rewrites that take the waste out of transformer inference.

    torch.compile(model, backend="thresher")        # no import needed
    thresher.compile(model, example_inputs, recipe) # raises where torch.compile would warn
    @thresher.optimize(recipe)                      # functions and nn.Module classes
    thresher.explain(model, example_inputs)         # a dry run, also on the meta device

Importing this package is cheap; torch is imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Certificate": "records.certificate",
    "RSQ": "quantization",
    "Recipe": "recipe",
    "Report": "report",
    "ThresherError": "errors",
    "ThresherWarning": "notices",
    "activation_density": "training.density_metrics",
    "calibrate": "api",
    "compile": "api",
    "density_loss": "training.density",
    "explain": "api",
    "find_recipe": "tools.auto",
    "export_onnx": "export",
    "load": "export",
    "nvfp4_training": "training.nvfp4",
    "optimize": "api",
    "pack_dataset": "runtime.packing.binpack",
    "quantize": "quantization",
    "relufy": "training.relu_swap",
    "save": "export",
    "token_types": "given_tokens",
}
__all__ = ["__version__", "reports", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"thresher.{_PUBLIC[name]}"), name)
    if name == "models":  # small real models and texts, for examples
        return importlib.import_module("thresher.tools.models")
    raise AttributeError(f"module 'thresher' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def reports() -> list[Any]:
    """Reports of the graphs compiled so far in this process and still in use, oldest first."""
    return [s.report for s in importlib.import_module("thresher.sessions").recent()]
