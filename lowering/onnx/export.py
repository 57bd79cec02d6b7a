"""ONNX: a rewritten Program as a model for ONNX Runtime, TensorRT, or any reader of the standard.

    program --onnx_convert--> model of each part --onnx_packing--> one model --onnx_write--> file --onnx_check--> record

`onnx_convert` replaces the program's own operators by plain ATen (`decompose`), its quantized linears by ONNX's forms
(`onnx_integers`, `onnx_nvfp4`, `onnx_tables`) and attention by runtimes' own operators (`onnx_attention`), and leaves
the rest to torch's exporter (`onnx_translate`). For a packed program `onnx_packing` puts the packing around the body.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from thresher.errors import ArgumentError, MissingDependencyError, unknown_key
from thresher.graph.packed_layout import PackedLayout
from thresher.graph.program import Program

from ..target import Runtime
from .convert import Parts
from .runtimes import BY_WORD
from .write import Exported, write

OPSET = 23  # the first with Attention, RMSNormalization and FLOAT4E2M1


def require_onnx() -> None:
    """Raise MissingDependencyError unless onnx, onnx-ir and onnxscript are there."""
    for package in ("onnx", "onnx_ir", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise MissingDependencyError(package, "onnx", "ONNX export") from None


def reader_of(runtime: str, accuracy_level: int = 0, table_bits: int = 0) -> Runtime:
    """What will read the file, by its word; raises ArgumentError for an unknown one or options that it has no form for."""
    if runtime not in BY_WORD:
        raise unknown_key("runtime", runtime, BY_WORD)
    reader = BY_WORD[runtime]
    if accuracy_level not in (0, 1, 2, 3, 4):
        raise ArgumentError(
            "accuracy_level", accuracy_level, "0 to 4", "4 is fastest, 0 and 1 compute in fp32."
        )
    if table_bits not in (0, 8) or (table_bits and "nbits" not in reader.low_bit):
        raise ArgumentError(
            "table_bits", f"{table_bits} for {runtime}", "0, or 8 for ort and ort-cuda", "Leave it out."
        )
    return reader


def export(
    program: Program,
    path: str | Path,
    *,
    runtime: str = "ort",
    body_only: bool = False,
    accuracy_level: int = 0,
    table_bits: int = 0,
    output_names: Sequence[str] | None = None,
    opset: int = OPSET,
    stage: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a program, packed or not, as an ONNX file; weights of large ones beside it in `NAME.data`.

    runtime: "portable" uses standard operators only; "ort" and "ort-cuda" also ONNX Runtime's own;
        "tensorrt" the forms TensorRT fuses.
    body_only: of a packed program write the body alone; its inputs are already packed tensors and
        `cu_seqlens`, to be made by the caller with thresher.runtime.packing.plan. TensorRT needs it, having no NonZero.
    accuracy_level: of `MatMulNBits`: 0 computes in fp32, 4 rounds activations to int8, several times faster.
    table_bits: 8 stores embedding tables, and a head that shares one, in 8 bits, for "ort" and "ort-cuda".

    stage: called with the name of what is being done, such as `onnx_stages.Stages`.

    Raises ArgumentError for an unknown runtime, ThresherError for what cannot be exported.
    """
    require_onnx()
    reader = reader_of(runtime, accuracy_level, table_bits)
    layout: PackedLayout | None = program.packing
    if reader.outside and layout is not None and not body_only:
        raise ArgumentError(
            "body_only", body_only, f"True for a packed program and {runtime}", f"Pass it. {reader.outside}"
        )
    if (
        layout is not None
        and not body_only
        and (layout.packing.form, layout.packing.outputs) != ("flat", "padded")
    ):
        given = f"form {layout.packing.form!r} and outputs {layout.packing.outputs!r}"
        raise ArgumentError("recipe", given, "form 'flat' and outputs 'padded' with packing in the graph",
                            "Export the body alone with body_only=True, or leave those options out.")  # fmt: skip
    started = time.perf_counter()
    parts = Parts(reader, runtime, accuracy_level, opset, table_bits, stage)
    from .graph import label_sizes
    from .packing import with_packing

    if layout is None or body_only:
        model = parts.convert(program, "body")
        label_sizes(model, packed_body=layout is not None)
    else:
        model = with_packing(program, layout, parts)
    names = list(output_names or [f"output_{i}" for i in range(len(model.graph.outputs))])
    return write(model, Path(path), names if layout is None or not body_only else None, parts, started)
