"""What TensorRT can do as a target to compile for: engines, with operators of ours between them.

For `coverage`, an operator that an engine holds by itself is native; the others run by their own kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx

from ..onnx import integers, nvfp4
from ..onnx.runtimes import TENSORRT
from ..target import NATIVE, REFUSED, Form, Runtime


def _account(of: Callable[[fx.Node, Runtime], tuple[str, str]]) -> Callable[[fx.Node, Runtime], Any]:
    """Of a form of ONNX files: native where TensorRT takes it, else None, for the operator's own kernel."""

    def account(node: fx.Node, runtime: Runtime) -> tuple[str, str] | None:
        return None if of(node, TENSORRT)[0] == REFUSED else (NATIVE, "")

    return account


FORMS = {
    "nvfp4_linear": Form(_account(nvfp4.account), nvfp4.put),
    "wna16_linear": Form(_account(integers.account), integers.put),
}


def _lower(options: Any, mode: str | None) -> Any:
    from .door import TensorRT
    from .options import Options

    return TensorRT(Options.of(options, mode), RUNTIMES[0])


RUNTIMES = (
    dataclasses.replace(
        TENSORRT,
        name="tensorrt",
        operators=True,
        sizes=True,
        outside="",
        forms=FORMS,
        lower=_lower,
        peer="inductor",
        options=frozenset({"build_only", "profiles", "builder"}),
        alone=True,
    ),
)
