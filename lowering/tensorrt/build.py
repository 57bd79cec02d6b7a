"""Builds a TensorRT engine from an ONNX file, and reads back which precisions its kernels use.

Stands alone: it imports neither torch nor Thresher, so that the Python of another environment can run it
(tensorrt-rtx and torch-tensorrt exclude each other's versions, and neither is needed to export):

    python build.py model.onnx engine.plan --sm SM120 --profile input_ids=1x8,4x64,16x256

Prints one JSON object. TensorRT-RTX builds for a named compute capability on a machine without a GPU;
TensorRT proper needs the GPU it builds for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FLAVORS = ("tensorrt_rtx", "tensorrt")


@dataclass
class Kernel:
    """One kernel of a plan. kind: function, runtime_fusion or fully_connected (a GEMM). operands: their types
    as far as the plan says. layers: ONNX nodes it covers."""

    kind: str
    name: str
    operands: list[str]
    layers: list[str]


@dataclass
class Built:
    """A built engine, or the reason why there is none (`error`)."""

    flavor: str
    version: str
    sm: str
    seconds: float = 0.0
    bytes: int = 0
    error: str = ""
    kernels: list[Kernel] = field(default_factory=list)


def library() -> tuple[str, Any]:
    """The name and module of the TensorRT that can be imported. Raises ImportError when none can."""
    reasons = []
    for name in FLAVORS:
        try:
            return name, importlib.import_module(name)
        except Exception as reason:  # a wheel without its libraries fails in many ways
            reasons.append(f"{name}: {reason}")
    raise ImportError("; ".join(reasons))


def build(
    onnx: Path, plan: Path, sm: str, profiles: dict[str, list[list[int]]], timing_cache: Path | None = None
) -> Built:
    """Build one engine. profiles: smallest, usual and largest shape of each input with varying sizes."""
    flavor, trt = library()
    logger = _logger(trt)
    result = Built(flavor, trt.__version__, sm)
    started = time.perf_counter()
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        result.error = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        return result
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if flavor == "tensorrt_rtx":
        # one capability: an unset list accepts types the device lacks, and one lacking member fails a whole list
        named = getattr(trt.ComputeCapability, sm, None)
        if named is None:
            known = ", ".join(sorted(n for n in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", n)))
            result.error = (
                f"TensorRT-RTX builds for {known}, and not for {sm}; TensorRT proper builds on the GPU itself"
            )
            return result
        config.num_compute_capabilities = 1
        config.set_compute_capability(named, 0)
    if profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in profiles.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    cache = None
    if timing_cache is not None and flavor == "tensorrt":  # in TensorRT-RTX the timing cache does nothing
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        result.error = "; ".join(logger.lines) or "the builder gave no engine and no reason"
        return result
    data = bytes(serialized)
    plan.write_bytes(data)
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(bytes(cache.serialize()))
    result.seconds, result.bytes = time.perf_counter() - started, len(data)
    result.kernels = kernels(data) if flavor == "tensorrt_rtx" else []
    return result


def _network_flags(trt: Any) -> int:
    """Strongly typed: the engine computes in the types the graph names, or fails."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None or trt.__name__ == "tensorrt_rtx" else 1 << int(flag)


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow attention without a fused kernel, as of heads of 8 values, to be products and a softmax instead of an error."""
    boundary = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # older versions know no such layer
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if boundary is not None and layer.type == boundary:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer gives the base class
            layer.attention.decomposable = True


def _logger(trt: Any) -> Any:
    class Errors(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)

    return Errors()


def kernels(plan: bytes) -> list[Kernel]:
    """Kernels in launch order, from the plan's text. The text is undocumented and differs between versions;
    `audit` refuses a plan in which it finds no kernel at all."""
    text = plan.decode("latin1")
    types = dict(re.findall(r'tensor=\{[^\n]*?name="([^"]+)"[^\n]*?type=(\w+)', text))
    found: list[Kernel] = []
    for kind, name, rest in re.findall(
        r'\n\s*(function|runtime_fusion|fully_connected)=\{ name="?([\w.]+)([^\n]*)', text
    ):
        inputs = re.search(r"input(?:_args)?=\{([^}]*)\}", rest)
        operands = [types.get(o, "?") for o in re.findall(r'"([^"]+)"', inputs.group(1))] if inputs else []
        layers = re.search(r'layers="([^"]*)"', rest)
        covered = re.findall(r"ONNX Layer: ([^\]]+)", layers.group(1)) if layers else []
        found.append(Kernel(kind, name, operands, covered))
    return found


def main(arguments: list[str]) -> int:
    """The command line of this file: build an engine from an ONNX file, say what it is made of; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--sm", default="SM120")
    parser.add_argument("--profile", action="append", default=[], metavar="NAME=MIN,OPT,MAX")
    parser.add_argument("--timing-cache", type=Path)
    given = parser.parse_args(arguments)
    profiles = {}
    for text in given.profile:
        name, _, shapes = text.partition("=")
        profiles[name] = [[int(n) for n in shape.split("x")] for shape in shapes.split(",")]
    try:
        result = build(given.onnx, given.plan, given.sm, profiles, given.timing_cache)
    except ImportError as reason:
        result = Built("none", "", given.sm, error=f"no TensorRT can be imported: {reason}")
    print(json.dumps(asdict(result)))
    return 1 if result.error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
