"""ONNX: a rewritten Program as a model for ONNX Runtime, TensorRT, or any reader of the standard.

The program's own operators become plain ATen (`decompose`) and its quantized linears ONNX's forms
(`onnx_forms`); torch's exporter translates the rest; `onnx_graph` puts types right and, for a packed program,
the packing around the body. The result is checked against the Program (`onnx_check`).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from thresher.errors import ArgumentError, MissingDependencyError, ThresherError, unknown_key
from thresher.layout import Counted, Gather, PackedLayout, Passed, PlanField
from thresher.program import Program, value

from .decompose import add_masks, decompose, op_name, own_nodes, windowed

RUNTIMES = ("portable", "ort", "ort-cuda", "tensorrt")
QUANTIZED = ("wna16_linear", "nvfp4_linear")
OPSET = 23  # the first with Attention, RMSNormalization and FLOAT4E2M1
_LARGE = 1 << 28  # bytes of weights from which they go into a file of their own


@dataclass
class Exported:
    """What was written and how far it is from the Program.

    differences: one entry for each input size and runtime: the largest difference of any result, absolute and
    relative to that result's largest value. notes: what a reader of the file should know.
    """

    path: str
    runtime: str
    opset: int
    inputs: list[str]
    outputs: list[str]
    bytes: int
    seconds: float
    nodes: dict[str, int]
    notes: list[str] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """Largest relative difference of all checks; NaN when nothing could be run."""
        return max((d["relative"] for d in self.differences), default=float("nan"))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_onnx() -> None:
    """Raise MissingDependencyError unless onnx, onnx-ir and onnxscript are there."""
    for package in ("onnx", "onnx_ir", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise MissingDependencyError(package, "onnx", "ONNX export") from None


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
) -> Exported:
    """Write a program, packed or not, as an ONNX file; weights of large ones beside it in `NAME.data`.

    runtime: "portable" uses standard operators only; "ort" and "ort-cuda" also ONNX Runtime's own;
        "tensorrt" the forms TensorRT fuses.
    body_only: of a packed program write the body alone; its inputs are already packed tensors and
        `cu_seqlens`, to be made by the caller with thresher.runtime.packing. TensorRT needs it, having no NonZero.
    accuracy_level: of `MatMulNBits`: 0 computes in fp32, 4 rounds activations to int8, several times faster.
    table_bits: 8 stores embedding tables, and a head that shares one, in 8 bits, for "ort" and "ort-cuda".

    Raises ArgumentError for an unknown runtime, ThresherError for what cannot be exported.
    """
    require_onnx()
    if runtime not in RUNTIMES:
        raise unknown_key("runtime", runtime, RUNTIMES)
    if accuracy_level not in (0, 1, 2, 3, 4):
        raise ArgumentError(
            "accuracy_level", accuracy_level, "0 to 4", "4 is fastest, 0 and 1 compute in fp32."
        )
    if table_bits not in (0, 8) or (table_bits and not runtime.startswith("ort")):
        raise ArgumentError(
            "table_bits", f"{table_bits} for {runtime}", "0, or 8 for ort and ort-cuda", "Leave it out."
        )
    layout: PackedLayout | None = program.packing
    if runtime == "tensorrt" and layout is not None and not body_only:
        raise ArgumentError("body_only", body_only, "True for a packed program and TensorRT",
                            "TensorRT has no NonZero: pack and unpack outside, as the runtime does.")  # fmt: skip
    if (
        layout is not None
        and not body_only
        and (layout.packing.form, layout.packing.outputs) != ("flat", "padded")
    ):
        given = f"form {layout.packing.form!r} and outputs {layout.packing.outputs!r}"
        raise ArgumentError("recipe", given, "form 'flat' and outputs 'padded' with packing in the graph",
                            "Export the body alone with body_only=True, or leave those options out.")  # fmt: skip
    started = time.perf_counter()
    parts = _Parts(runtime, accuracy_level, opset, table_bits)
    if layout is None or body_only:
        model = parts.convert(program, "body")
        _label_sizes(model, program if layout is None else None)
    else:
        model = _with_packing(program, layout, parts)
    names = list(output_names or [f"output_{i}" for i in range(len(model.graph.outputs))])
    return _write(model, Path(path), names if layout is None or not body_only else None, parts, started)


class _Parts:
    """Converts the parts of one export; collects what they say."""

    def __init__(self, runtime: str, accuracy_level: int, opset: int, table_bits: int):
        self.runtime, self.accuracy_level, self.opset, self.table_bits = (
            runtime,
            accuracy_level,
            opset,
            table_bits,
        )
        self.notes: list[str] = []
        self.functions: set[str] = set()
        self.fields: list[str] = []

    def convert(self, program: Program, name: str) -> Any:
        """One program as an untidied ONNX model; weights are called by their FQN."""
        from .onnx_attention import group_query
        from .onnx_forms import Forms
        from .onnx_graph import rename_initializers, restore_types

        copy = program.copy()
        _say_dense(copy, self.notes)
        forms = Forms(copy, self.runtime, self.accuracy_level, notes=self.notes, functions=self.functions)
        for node in own_nodes(copy):
            if op_name(node) in QUANTIZED:
                try:
                    forms.replace(node)
                except ValueError as reason:
                    raise ThresherError(
                        f"{node.name} cannot be exported for {self.runtime}: {reason}."
                    ) from None
        if self.table_bits:
            forms.tables()
        if self.runtime == "tensorrt":
            add_masks(copy)
        elif self.runtime != "portable":
            group_query(copy, on_gpu=self.runtime == "ort-cuda")
        columns = _columns(copy) if windowed(copy) else None
        decompose(copy, additive=self.runtime == "tensorrt", columns=columns)
        self.fields = list(copy.input_names)
        model = _translate(copy, self.opset)
        prefix = "module."
        restore_types(model, {prefix + n: k for n, k in forms.stored.items()})
        rename_initializers(model, {prefix + n: w.fqn for n, w in copy.weights.items()})
        return model


def _columns(program: Program) -> fx.Node:
    """The tokens' columns as an input of a packed body, added when it has none."""
    for place, name in zip(program.placeholders, program.input_names, strict=True):
        if name == "columns":
            return place
    node = next(n for n in program.nodes() if op_name(n) == "varlen_attention" and n in own_nodes(program))
    q, last = node.args[0], program.placeholders[-1]
    with program.graph.inserting_after(last):
        place = program.graph.placeholder("columns")
    mode = program.fake_mode()
    with mode:
        place.meta["val"] = torch.empty(value(q).shape[2], dtype=torch.int64)
    program.input_names.append("columns")
    return place


def _say_dense(program: Program, notes: list[str]) -> None:
    for name in ("sparse_down", "sparse_mlp"):
        found = [n for n in own_nodes(program) if op_name(n) == name]
        if found:
            notes.append(f"{len(found)} {name} nodes compute densely: ONNX has no operator that skips neurons. "
                         "The result is the same, the saving is not there.")  # fmt: skip


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


def _translate(program: Program, opset: int) -> Any:
    """A program of plain ATen and ONNX's own nodes as an onnx_ir model."""
    examples: list[Any] = []
    shapes: list[Any] = []
    for place in program.placeholders:
        known = value(place)
        if not isinstance(known, torch.Tensor):
            raise ThresherError(
                f"The input {place.name} is a number, which the graph still reads; ONNX takes tensors."
            )
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
    """Without the exporter's warnings about deprecated parts of torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _with_packing(program: Program, layout: PackedLayout, parts: _Parts) -> Any:
    import onnx_ir as ir

    from .onnx_graph import pack_around

    body = parts.convert(program, "body")
    # numbers counted for each call are refused before
    named = zip(program.input_names, layout.arguments, strict=True)
    by_name = {name: a for name, a in named if not isinstance(a, Counted)}
    fields: list[Gather | PlanField | Passed] = [by_name.get(n, PlanField(n)) for n in parts.fields]
    prologue = parts.convert(layout.prologue, "prologue") if layout.prologue is not None else None
    epilogue = parts.convert(layout.epilogue, "epilogue") if layout.epilogue is not None else None
    if layout.windowed():
        parts.notes.append("Sliding windows count padded columns, so rows with holes are exact too.")
    places = list(zip(layout.padded.placeholders, layout.padded.input_names, strict=True))
    inputs = [_input(place, name, ir) for place, name in places]
    ranks = {"input": [value(p).dim() for p, _ in places], "body": _ranks(program)}
    ranks["prologue"] = _ranks(layout.prologue) if layout.prologue is not None else []
    imports: dict[str, int] = {}
    for part in (body, prologue, epilogue):
        if part is not None:
            imports.update(part.opset_imports)
    return pack_around(inputs, layout, body, fields, prologue, epilogue, ranks, imports)


def _ranks(program: Program) -> list[int]:
    return [value(o).dim() if isinstance(value(o), torch.Tensor) else 0 for o in program.outputs]


def _input(place: fx.Node, name: str, ir: Any) -> Any:
    known = value(place)
    names = {0: "batch", 1: "sequence"}
    shape = [s if isinstance(s, int) else names.get(i, f"{name}_{i}") for i, s in enumerate(known.shape)]
    from torch.onnx._internal.exporter._core import torch_dtype_to_onnx_dtype

    dtype = torch_dtype_to_onnx_dtype(known.dtype)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _label_sizes(model: Any, program: Program | None) -> None:
    """Call the dimensions of inputs batch and sequence (tokens in a body) where that is what they are."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for given in model.graph.inputs:
        for index, size in enumerate(given.shape):
            if isinstance(size, ir.SymbolicDim) and size.value not in names:
                if program is not None:
                    known = (
                        ("batch", "sequence")[index]
                        if index < 2 and not len(names) > 1
                        else f"{given.name}_{index}"
                    )
                else:
                    known = "offsets" if given.name == "cu_seqlens" else "tokens"
                names[str(size.value)] = known if known not in names.values() else f"{known}_{len(names)}"
        given.shape = ir.Shape(
            [names.get(str(s.value), s) if isinstance(s, ir.SymbolicDim) else s for s in given.shape]
        )


def _write(model: Any, path: Path, names: list[str] | None, parts: _Parts, started: float) -> Exported:
    import onnx
    import onnx_ir as ir

    from .onnx_functions import add_functions
    from .onnx_graph import tidy

    tidy(model)
    for out, name in zip(model.graph.outputs, names or []):
        out.name = name
    add_functions(model, parts.functions)
    model.ir_version = max(model.ir_version or 0, 11 if parts.opset >= 23 else 10)
    model.producer_name = "thresher"
    weights = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    if weights > _LARGE:
        ir.save(model, str(path), external_data=data.name, size_threshold_bytes=1024)
    else:
        ir.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=False)
    counts: dict[str, int] = {}
    for node in model.graph:
        key = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counts[key] = counts.get(key, 0) + 1
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return Exported(
        str(path),
        parts.runtime,
        parts.opset,
        [v.name for v in model.graph.inputs],
        [v.name for v in model.graph.outputs],
        size,
        time.perf_counter() - started,
        dict(sorted(counts.items())),
        list(parts.notes),
    )
