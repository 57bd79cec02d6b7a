"""Options of `target="tensorrt"`, who builds its engines, and what is said where nothing can."""

import pytest
import torch
from engine_models import SM, model_and_inputs

import thresher
from thresher.errors import ArgumentError, MissingDependencyError, ThresherError
from thresher.lowering.tensorrt import engine, options
from thresher.lowering.tensorrt.options import Options


@pytest.fixture
def nothing(monkeypatch):
    """No TensorRT of any kind, and no GPU."""
    monkeypatch.delenv(engine.PYTHON, raising=False)
    monkeypatch.setattr(engine.tensorrt_build, "FLAVORS", ("no_such_tensorrt",))
    monkeypatch.setattr(options, "installed", lambda name: False)
    monkeypatch.setattr(options, "has_gpu", lambda: False)


def test_without_a_builder_or_a_gpu_it_is_an_error_that_names_the_extra(nothing):
    model, inputs = model_and_inputs()
    with pytest.raises(MissingDependencyError, match=r"thresher\[tensorrt\]") as error:
        thresher.compile(model, inputs, "none", target="tensorrt")
    assert "build_only='SM120'" in str(error.value) and "thresher[tensorrt-rtx]" in str(error.value)
    with pytest.raises(ThresherError, match=r"thresher\[tensorrt-rtx\]"):
        thresher.compile(model, inputs, "none", target="tensorrt", build_only=SM)
    with pytest.raises(Exception, match=r"thresher\[tensorrt\]"):  # torch wraps what a backend raises
        torch.compile(model, backend="thresher", options={"target": "tensorrt"})(**inputs)


def test_with_a_builder_and_no_gpu_it_says_what_can_be_done(monkeypatch):
    monkeypatch.setattr(options, "installed", lambda name: name == "torch_tensorrt")
    monkeypatch.setattr(options, "has_gpu", lambda: False)
    with pytest.raises(ThresherError, match=r"torch sees none\. build_only='SM120'"):
        Options.of({}).way()


@pytest.mark.parametrize(
    "there, builder, way",
    [
        ({"torch_tensorrt"}, "auto", "torch-tensorrt"),
        ({"torch_tensorrt", "tensorrt"}, "auto", "torch-tensorrt"),
        ({"torch_tensorrt", "tensorrt"}, "onnx", "onnx"),
        ({"tensorrt_rtx"}, "auto", "onnx"),
        ({"torch_tensorrt"}, "onnx", MissingDependencyError),
        ({"tensorrt"}, "torch-tensorrt", MissingDependencyError),
        (set(), "auto", MissingDependencyError),
    ],
)
def test_who_builds_on_a_gpu(there, builder, way, monkeypatch):
    monkeypatch.setattr(options, "installed", lambda name: name in there)
    monkeypatch.setattr(options, "has_gpu", lambda: True)
    if isinstance(way, str):
        assert Options.of({"builder": builder}).way() == way
    else:
        with pytest.raises(way):
            Options.of({"builder": builder}).way()


@pytest.mark.parametrize(
    "given, argument",
    [
        ({"build_only": "sm120"}, "build_only"),
        ({"build_only": 120}, "build_only"),
        ({"builder": "tensorrt"}, "builder"),
        ({"profiles": [1]}, "profiles"),
        ({"profiles": {"x": [(1, 2), (1, 2)]}}, r"profiles\['x'\]"),
        ({"profiles": {"x": [(1, 4), (1, 2), (1, 8)]}}, r"profiles\['x'\]"),
        ({"max_autotune": True}, "max_autotune"),
    ],
)
def test_options_are_checked(given, argument):
    with pytest.raises(ArgumentError, match=argument):
        Options.of(given)
    with pytest.raises(ArgumentError, match="mode"):
        Options.of({}, "reduce-overhead")


def test_an_option_of_another_target_is_not_ignored():
    model, inputs = model_and_inputs()
    with pytest.raises(ArgumentError, match=r"build_only.*target='tensorrt'"):
        thresher.compile(model, inputs, "none", build_only=SM)
    with pytest.raises(ArgumentError, match=r"profiles.*target='tensorrt'"):
        thresher.optimize("none", profiles={})
