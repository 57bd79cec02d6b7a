"""Real TensorRT-RTX engines for SM 8.9 and 12.0, built without a GPU, and what their kernels compute in."""

import functools
import json
import sys
import time

import blocks
import numpy as np
import onnx
import pytest
import rtx as rtx_python
from onnx import TensorProto, helper, numpy_helper

from thresher.errors import ArgumentError, ThresherError
from thresher.lowering.onnx import export as onnx_lowering
from thresher.lowering.tensorrt import build as tensorrt_build
from thresher.lowering.tensorrt import engine as tensorrt


@pytest.fixture
def rtx(monkeypatch):
    rtx_python.use(monkeypatch)


@functools.cache
def exported(folder):
    """All graphs, exported once: path and profiles by name."""
    base, _ = blocks.half()
    pruned, _ = blocks.pruned()
    programs = {
        "fp16": base,
        "int4": blocks.int4(base),
        "nvfp4": blocks.nvfp4(base),
        "packed": blocks.packed(),
        "pruned": pruned,
    }
    found = {}
    for name, program in programs.items():
        path = folder / f"{name}.onnx"
        record = onnx_lowering.export(
            program, path, runtime="tensorrt", body_only=program.packing is not None
        )
        ranges = blocks.shape_ranges(program, 8, 64, 256)
        found[name] = (path, {n: r for n, r in ranges.items() if n in record.inputs})
    (folder / "fp8.onnx").write_bytes(fp8(found["fp16"][0]).SerializeToString())
    found["fp8"] = (folder / "fp8.onnx", found["fp16"][1])
    return found


def fp8(path):
    """The fp16 layer with E4M3 weights and activations: quantize and dequantize around each product."""
    model = onnx.load(path)
    weights = {t.name: t for t in model.graph.initializer}
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    step = numpy_helper.from_array(np.float16(0.05), "step")
    nodes, seen = [], set()
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            weight = numpy_helper.to_array(weights[node.input[1]]).astype(np.float32)
            codes = helper.make_tensor(
                f"{node.name}.codes",
                TensorProto.FLOAT8E4M3FN,
                weight.shape,
                (weight / 0.01).flatten().tolist(),
            )
            model.graph.initializer.append(codes)
            x = node.input[0]
            if x not in seen:
                nodes.append(helper.make_node("QuantizeLinear", [x, "step", "zero"], [f"{x}.q"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{x}.q", "step", "zero"], [f"{x}.d"]))
                seen.add(x)
            nodes.append(
                helper.make_node("DequantizeLinear", [codes.name, "fine", "zero"], [f"{node.name}.w"])
            )
            node.input[0], node.input[1] = f"{x}.d", f"{node.name}.w"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([zero, step, numpy_helper.from_array(np.float16(0.01), "fine")])
    return model


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("sm", [pytest.param("SM89", marks=pytest.mark.thorough), "SM120"])
def test_engines_of_every_graph(rtx, graphs, tmp_path, sm, pytestconfig):
    """Within a minute and a half; kernels and operand types as promised. In a plain run those of low-bit operands."""
    started, whole = time.perf_counter(), pytestconfig.getoption("--thorough")
    for name, (path, profiles) in graphs.items():
        if (name, sm) == ("nvfp4", "SM89") or not (whole or name in ("int4", "nvfp4", "fp8")):
            continue
        engine = tensorrt.build(path, tmp_path / "plan", sm, profiles)
        assert engine.bytes > 50_000 and engine.kernels, (name, sm)
        assert engine.count("_gemm_mha_v2") == 1, (name, sm)  # one fused attention kernel
        low = {"int4": "int4", "nvfp4": "fp4_e2m1", "fp8": "fp8_e4m3"}.get(name)
        assert len(engine.promised) == {"int4": 7, "nvfp4": 7, "fp8": 8}.get(name, 0)
        assert all(set(types) == {low} for types in engine.promised.values())
        if name == "int4":
            assert all(k.kind == "runtime_fusion" for k in engine.kernels if "int4" in k.operands)
    assert time.perf_counter() - started < 90


@pytest.mark.slow
def test_a_gpu_without_the_operands_is_refused(rtx, graphs, tmp_path):
    path, profiles = graphs["nvfp4"]
    with pytest.raises(ThresherError, match="fp4_e2m1"):
        tensorrt.build(path, tmp_path / "plan", "SM89", profiles)


@pytest.mark.slow
def test_a_precision_that_is_not_realised_is_an_error(rtx, tmp_path):
    """Weight-only FP4 builds, and its weights are expanded to half before the product."""
    base, _ = blocks.half()
    with pytest.raises(tensorrt.PrecisionError, match="7 of 7 matrix products"):
        tensorrt.lower(blocks.nvfp4(base, "exact"), tmp_path, "SM120", blocks.shape_ranges(base, 8, 64, 256))


@pytest.mark.slow
def test_engines_are_kept_by_model_capability_and_profile(rtx, graphs, tmp_path):
    path, profiles = graphs["pruned"]
    first = tensorrt.build(path, tmp_path / "plan", "SM120", profiles, cache=tmp_path / "cache")
    again = tensorrt.build(path, tmp_path / "plan2", "SM120", profiles, cache=tmp_path / "cache")
    other = tensorrt.build(path, tmp_path / "plan3", "SM89", profiles, cache=tmp_path / "cache")
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert (tmp_path / "plan").read_bytes() == (tmp_path / "plan2").read_bytes()
    assert again.kernels == first.kernels


def test_the_audit_names_what_is_missing():
    kernel = tensorrt_build.Kernel
    engine = tensorrt.Engine("", "SM120", "tensorrt_rtx", "1", 0, 0.0, False, {}, [
        kernel("fully_connected", "gemm", ["half", "half"], ["a"]),
        kernel("fully_connected", "gemm4", ["fp4_e2m1", "fp4_e2m1", "float"], ["b"]),
        kernel("runtime_fusion", "fused", ["half", "int4"], ["c"]),
        kernel("function", "expand", ["int4", "half"], ["d"]),
    ])  # fmt: skip
    assert tensorrt.audit({"b": ["fp4_e2m1", "fp4_e2m1"], "c": ["int4"]}, engine) == []
    (missing,) = tensorrt.audit({"a": ["fp4_e2m1"]}, engine)
    assert "a should multiply fp4_e2m1" in missing and "half/half" in missing
    assert len(tensorrt.audit({"c": ["int4", "int4"], "d": ["int4"], "e": ["int4"]}, engine)) == 3
    engine.kernels = []
    assert "lists no kernels" in tensorrt.audit({"a": ["int4"]}, engine)[0]


def test_kernels_are_read_from_a_plans_text():
    text = (
        '\n tensor={ name="x" type=half }\n tensor={ name="w" type=int4 }\n'
        ' runtime_fusion={ name="fused" input={ "x" "w" } layers="[ONNX Layer: a] [ONNX Layer: b]" }\n'
    )
    assert tensorrt_build.kernels(text.encode()) == [
        tensorrt_build.Kernel("runtime_fusion", "fused", ["half", "int4"], ["a", "b"])
    ]


def test_a_missing_builder_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv(tensorrt.PYTHON, raising=False)
    monkeypatch.setattr(tensorrt_build, "FLAVORS", ("no_such_tensorrt",))
    assert "pip install 'thresher[tensorrt-rtx]'" in tensorrt.unavailable()
    monkeypatch.setenv(tensorrt.PYTHON, "/no/such/python")
    with pytest.raises(ArgumentError, match=tensorrt.PYTHON):
        tensorrt.builder()


def test_a_builder_that_dies_is_an_error_and_not_a_crash(monkeypatch, tmp_path):
    script = tmp_path / "build.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv(tensorrt.PYTHON, sys.executable)
    monkeypatch.setattr(tensorrt_build, "__file__", str(script))
    with pytest.raises(ThresherError, match="killed by signal 11"):
        tensorrt.build(tmp_path / "m.onnx", tmp_path / "plan", "SM120")
    script.write_text(f"print({json.dumps(json.dumps({'error': 'no such type'}))})\n")
    with pytest.raises(ThresherError, match="no such type"):
        tensorrt.build(tmp_path / "m.onnx", tmp_path / "plan", "SM120")
    with pytest.raises(ArgumentError, match="three shapes"):
        tensorrt.build(tmp_path / "m.onnx", tmp_path / "plan", "SM120", {"x": [[1, 2]]})
