"""Writes an ONNX model: tidied, checked, large weights in a file beside it; and the record of what was written."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .convert import Parts

WIDENED = (
    "ONNX Runtime on a CPU multiplies no bf16: the file holds weights in bf16 and computes in fp32, also its inputs and "
    "outputs. It is nearer to exact than the model in bf16 is."
)
_LARGE = 1 << 28  # bytes of weights from which they go into a file of their own


@dataclass
class Exported:
    """What was written and how far it is from the Program.

    products: the weight that a matrix product multiplies by, by the product's node.
    differences: one entry for each input size and runtime: the largest difference of any result, absolute and
    relative to that result's largest value. notes: what a reader of the file should know.
    widened: the Program computes in bf16 and the file in fp32; differences are then from the Program run in fp32.
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
    products: dict[str, str] = field(default_factory=dict)
    widened: bool = False

    @property
    def worst(self) -> float:
        """Largest relative difference of all checks; NaN when nothing could be run."""
        return max((d["relative"] for d in self.differences), default=float("nan"))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, which JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB for {self.runtime}, opset {self.opset}, "
            f"{sum(self.nodes.values())} nodes; {', '.join(self.inputs)} -> {', '.join(self.outputs)}"
        ]
        for d in self.differences:
            sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in d["sizes"].items())
            lines.append(
                f"  {d['engine']} at {sizes}: {d['absolute']:.1e} from the program, {d['relative']:.1e} relative"
            )
        if not self.differences:
            lines.append("  checked, and not run")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def write(model: Any, path: Path, names: list[str] | None, parts: Parts, started: float) -> Exported:
    """Write a model; names: of its outputs, where they have none of their own. started: when the export began."""
    import onnx
    import onnx_ir as ir

    from .functions import add_functions
    from .graph import tidy
    from .widen import widen

    parts.stage("folding constants")
    shapes = [out.shape for out in model.graph.outputs]
    tidy(model)
    widened = not parts.runtime.gpu and parts.runtime.segments and widen(model)
    if widened:
        parts.notes.append(WIDENED)
    for out, known in zip(model.graph.outputs, shapes):
        if known is not None:  # folding gives an output another value, whose sizes are less well known
            out.shape = known
    for out, name in zip(model.graph.outputs, names or []):
        out.name = name
    add_functions(model, parts.functions)
    model.ir_version = max(model.ir_version or 0, 11 if parts.opset >= 23 else 10)
    model.producer_name = "thresher"
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    size = sum(w.nbytes for w in weights)
    # in a folder of its own first, under the name that the model calls its data by: an interrupted or refused
    # export leaves what was there
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        fresh = Path(scratch) / path.name
        parts.stage(f"writing {size / 1e6:.0f} MB")
        if size > _LARGE:
            ir.save(model, str(fresh), external_data=data.name, size_threshold_bytes=1024)
        else:
            ir.save(model, str(fresh))
        parts.stage("checking the file")
        onnx.checker.check_model(str(fresh), full_check=True)
        if size > _LARGE:
            (Path(scratch) / data.name).replace(data)
        fresh.replace(path)
        if size <= _LARGE:
            data.unlink(missing_ok=True)  # of the model that was there before
    counts: dict[str, int] = {}
    for node in model.graph:
        key = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counts[key] = counts.get(key, 0) + 1
    return Exported(
        str(path),
        parts.word,
        parts.opset,
        [v.name for v in model.graph.inputs],
        [v.name for v in model.graph.outputs],
        path.stat().st_size + (data.stat().st_size if data.exists() else 0),
        time.perf_counter() - started,
        dict(sorted(counts.items())),
        list(parts.notes),
        products=dict(parts.products),
        widened=widened,
    )
