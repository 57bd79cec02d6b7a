"""TensorRT engines from exported programs, and the audit of what they compute in.

An engine is built from an ONNX file by `tensorrt_build`, always in a process of its own: a builder that crashes
must not take the caller along, and TensorRT-RTX may live in another environment (`THRESHER_RTX_PYTHON` names
its Python). TensorRT-RTX builds for a named GPU on any machine; TensorRT proper needs the GPU it builds for.

A low-precision graph may build and silently compute in higher precision (NVIDIA/TensorRT#4833). So the audit
compares each matrix product whose weights the ONNX graph dequantizes with the operand types of the kernel that
covers it, and what was promised and not realised is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thresher.errors import ArgumentError, ThresherError
from thresher.graph.program import Program

from ..onnx.export import export
from . import build as tensorrt_build

PYTHON = "THRESHER_RTX_PYTHON"
UNVERIFIED = (
    "Running an engine, its speed and its numbers need a GPU and are not verified by Thresher's tests; neither is "
    "TensorRT proper, whose builder needs one too. What is verified is that TensorRT-RTX builds the engines and "
    "which kernels and operand types are in them."
)
# ONNX weight types and the names TensorRT's plans give them
_TYPES = {
    "INT4": "int4",
    "UINT4": "int4",
    "INT8": "int8",
    "UINT8": "uint8",
    "FLOAT8E4M3FN": "fp8_e4m3",
    "FLOAT4E2M1": "fp4_e2m1",
}
_THROUGH = {"Transpose", "Reshape", "Cast", "Unsqueeze", "Squeeze"}


class PrecisionError(ThresherError):
    """An engine does not compute in the precision its graph promises."""


@dataclass
class Engine:
    """A built engine. promised: operand types by matrix product; kernels: what the plan holds, in order.

    seconds: of the build, 0 when it came from the cache. cached: whether it did. sites: for each matrix product, by
        the name of its node, what the engine multiplies.
    """

    path: str
    sm: str
    flavor: str
    version: str
    bytes: int
    seconds: float
    cached: bool
    promised: dict[str, list[str]]
    kernels: list[tensorrt_build.Kernel] = field(default_factory=list)
    sites: dict[str, str] = field(default_factory=dict)

    def covering(self, layer: str) -> list[tensorrt_build.Kernel]:
        """The kernels that compute an ONNX node."""
        return [k for k in self.kernels if layer in k.layers]

    def count(self, name: str) -> int:
        """How many kernels have this text in their names."""
        return sum(name in k.name for k in self.kernels)


def builder() -> str:
    """The Python that can build engines. Raises ThresherError with the remedy when there is none."""
    named = os.environ.get(PYTHON)
    if named:
        if shutil.which(named) is None:
            raise ArgumentError(
                PYTHON, named, "the path of a Python with tensorrt-rtx", "Correct the variable."
            )
        return named
    if any(importlib.util.find_spec(name) for name in tensorrt_build.FLAVORS):
        return sys.executable
    raise ThresherError(
        "Building TensorRT engines needs tensorrt-rtx or tensorrt. Install it with: "
        f"pip install 'thresher[tensorrt-rtx]', or into an environment of its own whose Python {PYTHON} names."
    )


def unavailable() -> str | None:
    """Why no engine can be built here, or None."""
    try:
        builder()
    except ThresherError as reason:
        return str(reason)
    return None


def build(
    onnx: str | Path,
    plan: str | Path,
    sm: str,
    profiles: Mapping[str, Sequence[Sequence[int]]] | None = None,
    *,
    cache: str | Path | None = None,
    timeout: float = 600.0,
) -> Engine:
    """Build an engine from an ONNX file and audit it.

    sm: compute capability as "SM89", "SM120". profiles: for each input with varying sizes its smallest, usual
        and largest shape. cache: a folder in which engines are kept by model, capability, profile and version.

    Raises PrecisionError when a promised precision was not realised, ThresherError when nothing was built.
    """
    onnx, plan = Path(onnx), Path(plan)
    chosen = {name: [list(shape) for shape in shapes] for name, shapes in (profiles or {}).items()}
    for name, shapes in chosen.items():
        if len(shapes) != 3 or len({len(s) for s in shapes}) != 1:
            raise ArgumentError(
                f"profiles[{name!r}]", shapes, "three shapes of one rank", "Give smallest, usual, largest."
            )
    python = builder()
    kept = Path(cache) / f"{_key(onnx, sm, chosen, python)}.json" if cache is not None else None
    if kept is not None and kept.exists() and kept.with_suffix(".plan").exists():
        shutil.copyfile(kept.with_suffix(".plan"), plan)
        return _audited(onnx, _engine(json.loads(kept.read_text()), plan, cached=True))
    command = [python, str(Path(tensorrt_build.__file__)), str(onnx), str(plan), "--sm", sm]
    for name, shapes in chosen.items():
        command += ["--profile", f"{name}=" + ",".join("x".join(map(str, s)) for s in shapes)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise ThresherError(f"The engine for {sm} was not built within {timeout:.0f} s.") from None
    if not ran.stdout.strip():
        how = (
            f"was killed by signal {-ran.returncode}"
            if ran.returncode < 0
            else f"ended with {ran.returncode}"
        )
        raise ThresherError(f"TensorRT's builder {how} on {onnx.name} for {sm}. {ran.stderr.strip()[-500:]}")
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    if found["error"]:
        raise ThresherError(f"TensorRT built no engine from {onnx.name} for {sm}: {found['error']}")
    engine = _audited(onnx, _engine(found, plan, cached=False))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan, kept.with_suffix(".plan"))
        kept.write_text(json.dumps(found))
    return engine


def lower(
    program: Program,
    folder: str | Path,
    sm: str,
    profiles: Mapping[str, Sequence[Sequence[int]]] | None = None,
    *,
    cache: str | Path | None = None,
) -> Engine:
    """Export a program (of a packed one the body; pack and unpack outside) and build its engine."""
    folder = Path(folder)
    record = export(program, folder / "model.onnx", runtime="tensorrt", body_only=program.packing is not None)
    wanted = {n: s for n, s in (profiles or {}).items() if n in record.inputs}
    return build(record.path, folder / f"engine.{sm.lower()}.plan", sm, wanted, cache=cache)


def products(onnx: str | Path) -> dict[str, list[str]]:
    """Low-precision operand types, in a plan's words, of each matrix product of an ONNX graph, by its node's name.

    A product promises a type for each operand that a DequantizeLinear of such codes gives; most promise none.
    """
    import onnx as library

    model = library.load(str(onnx), load_external_data=False)
    maker = {out: node for node in model.graph.node for out in node.output}
    stored = {t.name: library.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}

    def low(name: str) -> str | None:
        node = maker.get(name)
        while node is not None and node.op_type in _THROUGH:
            node = maker.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        codes = node.input[0]
        if codes in stored:
            return _TYPES.get(stored[codes])
        quantizer = maker.get(codes)
        if quantizer is not None and quantizer.op_type == "TRT_FP4DynamicQuantize":
            return _TYPES["FLOAT4E2M1"]
        if quantizer is not None and quantizer.op_type == "QuantizeLinear" and len(quantizer.input) > 2:
            return _TYPES.get(stored.get(quantizer.input[2], ""))
        return None

    return {
        node.name: [t for t in map(low, node.input[:2]) if t is not None]
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
    }


def promises(onnx: str | Path) -> dict[str, list[str]]:
    """The matrix products that promise low-precision operands; see `products`."""
    return {name: types for name, types in products(onnx).items() if types}


def realised(layers: Iterable[str], engine: Engine) -> dict[str, str]:
    """For each matrix product, by its node's name, what the engine multiplies and in which kind of kernel."""
    said = {}
    for layer in layers:
        covering = [k for k in engine.covering(layer) if k.kind in ("fully_connected", "runtime_fusion")]
        shown = dict.fromkeys(f"{' by '.join(k.operands[:2]) or 'unsaid types'}, {k.kind}" for k in covering)
        said[layer] = "; ".join(shown) or "no kernel of its own: folded, or fused under another name"
    return said


def audit(promised: Mapping[str, Sequence[str]], engine: Engine) -> list[str]:
    """What was promised and not realised, a sentence each."""
    missing = []
    if promised and not engine.kernels:
        return [
            f"The plan of {engine.flavor} {engine.version} lists no kernels, so nothing can be confirmed."
        ]
    for layer, types in promised.items():
        products = [k for k in engine.covering(layer) if k.kind in ("fully_connected", "runtime_fusion")]
        if not any(all(k.operands.count(t) >= types.count(t) for t in types) for k in products):
            seen = (
                ", ".join(f"{k.name} with {'/'.join(k.operands[:2])}" for k in products)
                or "no kernel of its own"
            )
            missing.append(f"{layer} should multiply {' by '.join(types)} and became {seen}.")
    return missing


def _audited(onnx: Path, engine: Engine) -> Engine:
    found = products(onnx)
    engine.promised = {name: types for name, types in found.items() if types}
    engine.sites = realised(found, engine)
    missing = audit(engine.promised, engine)
    if missing:
        raise PrecisionError(
            f"The engine for {engine.sm} does not keep the precision of {len(missing)} of {len(engine.promised)} "
            f"matrix products: {missing[0]} Weight-only FP4 is known to be expanded to half; quantize the activations "
            "too (activations='nvfp4'), or use 4-bit integers."
        )
    return engine


def _engine(found: Mapping[str, Any], plan: Path, cached: bool) -> Engine:
    kernels = [tensorrt_build.Kernel(**k) for k in found["kernels"]]
    seconds = 0.0 if cached else found["seconds"]
    return Engine(
        str(plan),
        found["sm"],
        found["flavor"],
        found["version"],
        found["bytes"],
        seconds,
        cached,
        {},
        kernels,
    )


def _key(onnx: Path, sm: str, profiles: Any, python: str) -> str:
    digest = hashlib.sha256(json.dumps([sm, profiles, versions(python)], sort_keys=True).encode())
    for file in (onnx, onnx.with_name(onnx.name + ".data")):
        if file.exists():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def versions(python: str) -> str:
    """The TensorRT packages of a Python, with versions."""
    script = (
        "import importlib.metadata as m\n"
        "for n in ('tensorrt-rtx', 'tensorrt'):\n"
        "    try: print(n, m.version(n))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    return subprocess.run([python, "-c", script], capture_output=True, text=True).stdout
