"""What the readers of ONNX files can do, and the forms of their own that some operators have."""

from __future__ import annotations

import torch
from torch import fx

from thresher.graph.nodes import value

from ..target import Form, Runtime
from . import attention, integers, nvfp4

FORMS = {
    "nvfp4_linear": Form(nvfp4.account, nvfp4.put),
    "varlen_attention": Form(attention.account, attention.put),
    "wna16_linear": Form(integers.account, integers.put),
}


def _refuses(node: fx.Node) -> str | None:
    known = value(node)
    if isinstance(known, torch.Tensor) and known.dtype.is_complex:
        return "ONNX operators take no complex numbers."
    return None


PORTABLE = Runtime("onnx-portable", low_bit=frozenset({"fp4"}), forms=FORMS, refuses=_refuses)
ORT = Runtime("onnx-ort", segments=True, low_bit=frozenset({"nbits"}), forms=FORMS, refuses=_refuses)
ORT_CUDA = Runtime(
    "onnx-ort-cuda", segments=True, gpu=True, low_bit=frozenset({"nbits"}), forms=FORMS, refuses=_refuses
)
TENSORRT = Runtime(
    "onnx-tensorrt",
    outside="TensorRT has no NonZero: the caller packs and unpacks around the engine.",
    added_masks=True,
    gpu=True,
    low_bit=frozenset({"fp4", "fp4_activations"}),
    forms=FORMS,
    refuses=_refuses,
)
RUNTIMES = (PORTABLE, ORT, ORT_CUDA, TENSORRT)
BY_WORD = {r.name.removeprefix("onnx-"): r for r in RUNTIMES}
"""By the word that `export_onnx(runtime=...)` takes."""
