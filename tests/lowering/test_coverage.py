"""What a target will make of a program is known before it is built, and agrees with what is then built."""

import functools

import blocks
import captures
import pytest
import torch
import zoo

from thresher import backend
from thresher.errors import ArgumentError, ThresherError
from thresher.lowering.catalog import TARGETS
from thresher.lowering.coverage import coverage
from thresher.lowering.onnx import export as onnx
from thresher.recipe import Recipe


@functools.cache
def packed():
    program = captures.of_zoo("llama", "export-dynamic")
    _, inputs = zoo.ZOO["llama"].build()
    return backend.run_pipeline(program, Recipe.of("exact"), captures.arguments(program, inputs))[0]


@pytest.mark.parametrize("target", TARGETS)
def test_a_packed_program(target):
    found = coverage(packed(), target)
    assert not found.refused
    assert [e.operator for e in found.entries if e.operator.startswith("thresher")] == [
        "thresher.varlen_attention.default"
    ] * 2
    assert found.others > 100 and 0.9 < found.native <= 1
    assert all(e.reason.endswith(".") for e in found.entries if e.how != "native")
    assert target in str(found)
    if target == "onnx-tensorrt":
        assert found.entries[-1].operator == "pack and unpack"


def test_an_unrewritten_program_is_native_everywhere():
    for target in TARGETS:
        found = coverage(captures.of_zoo("llama", "export-dynamic"), target)
        assert found.native == 1 and not found.entries


def test_refusals_are_what_building_refuses(tmp_path):
    base, _ = blocks.half()
    weight_only, both = blocks.nvfp4(base, "exact"), blocks.nvfp4(base)
    assert {e.how for e in coverage(both, "onnx-tensorrt").entries} == {"native"}
    refused = coverage(weight_only, "onnx-tensorrt").refused
    assert len(refused) == 7 and all("expands" in e.reason for e in refused)
    assert {e.how for e in coverage(both, "tensorrt").entries} == {"native"}  # inside the engines
    beside = coverage(weight_only, "tensorrt")  # by kernels of ours, between engines
    assert not beside.refused and all(e.how != "refused" for e in beside.entries) and len(beside.entries) == 7
    assert {e.how for e in coverage(weight_only, "onnx-ort").entries} == {"fallback"}
    assert {e.how for e in coverage(blocks.int4(base), "onnx-ort").entries} == {"native"}
    assert {e.how for e in coverage(blocks.int4(base), "onnx-portable").entries} == {"decomposed"}


def test_an_unknown_target_is_named():
    with pytest.raises(ArgumentError, match="Did you mean 'tensorrt'"):
        coverage(captures.of_zoo("llama", "export-dynamic"), "tensort")


def test_a_fixed_scale_is_missing_before_and_while_exporting(tmp_path):
    base, _ = blocks.half()
    program = blocks.nvfp4(base)
    for node in program.nodes():
        if "nvfp4" in str(node.target):
            node.update_arg(4, None)
    assert len(coverage(program, "onnx-tensorrt").refused) == 7
    with pytest.raises(ThresherError, match="Calibrate"):
        onnx.export(program, tmp_path / "m.onnx", runtime="tensorrt")


def test_sizes_that_are_inputs_are_refused_before_and_while_exporting(tmp_path):
    """What Dynamo hands over: a number for each size that varies, which code reads; and none from torch.export."""
    program = captures.of_zoo("llama", "dynamo-dynamic")
    numbers = [p.name for p in program.placeholders if not isinstance(p.meta["val"], torch.Tensor)]
    assert numbers
    for target in TARGETS:
        takes = target in ("reference", "inductor", "aoti", "tensorrt")
        refused = coverage(program, target).refused
        assert [e.node for e in refused] == ([] if takes else numbers), target
        assert all("takes tensors alone" in e.reason for e in refused)
    with pytest.raises(ThresherError, match="takes tensors alone"):
        onnx.export(program, tmp_path / "m.onnx")
