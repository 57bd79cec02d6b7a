"""Writes an ONNX model: tidied, checked, large weights in a file beside it; and the record of what was written."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .onnx_convert import Parts

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


def write(model: Any, path: Path, names: list[str] | None, parts: Parts, started: float) -> Exported:
    """Write a model; names: of its outputs, where they have none of their own. started: when the export began."""
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
