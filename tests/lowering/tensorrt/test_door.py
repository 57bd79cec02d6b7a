"""`target="tensorrt"`: every method's rewrite as engines that are built without a GPU, and what users are told."""

import json
from pathlib import Path

import fake_tensorrt
import pytest
import rtx
import torch
import zoo
from engine_models import SM, model_and_inputs
from own_cache import own_cache
from sampled import sampled

import thresher
from thresher import ops
from thresher.errors import ArgumentError, ThresherError
from thresher.lowering.coverage import coverage
from thresher.lowering.tensorrt import door, engine, kept, options
from thresher.lowering.tensorrt.options import Options

# Options at which the methods find something to do in a model of width 64.
METHODS = {
    "prepack": {"prepack": True},
    "transprune": {"transprune": dict(stages=((1, 0.5),), min_image_tokens=1, bucket=1, min_saving=0.0,
                                      image_token_id=zoo.IMAGE_TOKEN, budget=2.0)},
    "zipvl": {"zipvl": dict(keep=0.5, recent=2, spread=2, sinks=1, bucket=1, min_saving=0.0, budget=2.0)},
    "deft": {"deft": {"min_bytes": 0}},
    "rsq": {"rsq": {"group_size": 32, "budget": 1.0}},
    "nvfp4": {"nvfp4": {"min_weights": 0, "budget": 2.0, "activations": "nvfp4", "input_scale": "calibrated"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    """A size that varied in one test is none that varies in the next."""
    torch._dynamo.reset()


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Engines can be built, and are kept in a folder of the test's own."""
    rtx.use(monkeypatch)
    monkeypatch.setenv("THRESHER_CACHE_DIR", own_cache(tmp_path / "cache"))


def recipe(method, model, inputs, folder):
    given = METHODS[method]
    if method == "rsq":
        low = thresher.quantize(model, [dict(inputs)], given)
        low.save(folder / "low.safetensors")
        return low.options
    if method == "nvfp4":
        stats = thresher.calibrate(model, [dict(inputs)], given)
        stats.save(folder / "stats.safetensors")
        return {**given, "stats": str(folder / "stats.safetensors")}
    return given


@pytest.mark.slow
@pytest.mark.parametrize("method", sampled([m for m in METHODS if m != "transprune"], list(METHODS)))
def test_every_method_becomes_engines(method, builds, tmp_path):
    model, inputs = model_and_inputs(method)
    asked = recipe(method, model, inputs, tmp_path)
    ours = thresher.compile(model, inputs, {**asked, "verify": False}, target="tensorrt", build_only=SM)
    session = max(ours.sessions, key=lambda s: len(s.report.engines))
    report = session.report
    assert report[method].rewritten and report.target == "tensorrt" and report.engines
    assert all(e.gpu == SM and e.bytes and not e.runs and "rtx" in e.builder for e in report.engines)
    sites = {name: said for e in report.engines for name, said in e.sites.items()}
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    named = {s for s in sites if s.removesuffix(".weight") in linears}
    assert named, sites
    if method == "nvfp4":
        inside = [s for s in sites.values() if "fp4_e2m1 by fp4_e2m1" in s]
        assert len(inside) == len(report["nvfp4"].rewritten)
    if method == "rsq":
        assert sum("int4" in s for s in sites.values()) == len(report["rsq"].rewritten)
    if method == "prepack":  # attention over packed tokens is a kernel of ours, between engines
        assert len(report.engines) == 2 and len(named) == 8
    assert f"for {SM}" in str(report) and json.loads(report.to_json())["engines"]
    assert type(report).from_dict(report.to_dict()).engines == report.engines


@pytest.mark.slow
def test_sizes_become_profiles_and_a_changed_weight_another_engine(builds, tmp_path):
    model, inputs = model_and_inputs()
    profiles = {"input_ids": [(1, 4), (3, 16), (8, 32)], "attention_mask": [(1, 4), (3, 16), (8, 32)]}
    made = thresher.compile(
        model, inputs, "none", target="tensorrt", build_only=SM, dynamic=True, profiles=profiles
    )
    (built,) = made.report.engines
    assert built.profiles["input_ids"] == [[1, 4], [3, 16], [8, 32]] and not built.cached
    made(**{n: t[:2, :9].contiguous() for n, t in inputs.items()})
    assert (built.rebuilt, len(made.reports)) == (0, 1)

    torch._dynamo.reset()
    again = thresher.compile(
        model, inputs, "none", target="tensorrt", build_only=SM, dynamic=True, profiles=profiles
    )
    assert again.report.engines[0].cached and again.report.engines[0].seconds == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    actual = again(**inputs).logits
    assert again.report.engines[0].rebuilt == 1 and not again.report.engines[0].cached
    torch.testing.assert_close(actual, model(**inputs).logits, rtol=1e-2, atol=1e-2)
    again(**inputs)
    assert again.report.engines[0].rebuilt == 1

    path = thresher.save(again, tmp_path / "m.thresher", example_inputs=inputs)
    loaded = thresher.load(path, "tensorrt", build_only=SM)
    torch.testing.assert_close(loaded(**inputs).logits, actual, rtol=1e-2, atol=1e-2)
    assert [e.gpu for e in loaded.session.report.engines] == [SM]


@pytest.mark.slow
def test_torch_compile_and_the_decorator_take_it(builds):
    model, inputs = model_and_inputs()
    given = {"target": "tensorrt", "build_only": SM, "recipe": "exact"}
    fast = torch.compile(model, backend="thresher", options=given)
    with torch.no_grad():
        fast(**inputs)
        expected = model(**inputs).logits
    assert any(r.engines for r in thresher.reports())

    @thresher.optimize("none", target="tensorrt", build_only=SM)
    def function(ids, mask):
        return model(input_ids=ids, attention_mask=mask).logits

    with torch.no_grad():
        torch.testing.assert_close(function(*inputs.values()), expected, rtol=1e-2, atol=1e-2)


def test_what_cannot_become_engines_is_an_error_and_runs_by_nothing_else(monkeypatch):
    """Under torch.compile too, where other targets leave such a graph to Inductor with a warning."""
    monkeypatch.setattr(Options, "way", lambda self: "onnx")

    def training(x, w):
        return (x @ w).sum() + x.relu().sum()

    x = torch.randn(4, 4, requires_grad=True)
    with pytest.raises(Exception, match="Gradients are being recorded"):
        torch.compile(training, backend="thresher", options={"target": "tensorrt"})(x, x)


def test_coverage_says_what_is_in_the_engines():
    import blocks

    base, _ = blocks.half()
    found = coverage(blocks.int4(base), "tensorrt")
    assert {e.how for e in found.entries} == {"native"} and len(found.entries) == 7
    assert not coverage(blocks.packed(), "tensorrt").refused


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that builds and runs: the ONNX file stands for the engine."""

    def build(onnx, plan, sm, profiles):
        Path(plan).write_bytes(Path(onnx).read_bytes())
        return engine.Engine(str(plan), sm, "tensorrt", "of this test", 1, 0.1, False, {})

    monkeypatch.setenv("THRESHER_CACHE_DIR", own_cache(tmp_path / "cache"))
    monkeypatch.setattr(options, "has_gpu", lambda: True)
    monkeypatch.setattr(options, "installed", lambda name: name == "tensorrt")
    monkeypatch.setattr(engine, "build", build)
    monkeypatch.setattr(engine, "builder", lambda: "python")
    monkeypatch.setattr(engine, "versions", lambda python: "of this test")
    monkeypatch.setattr(kept, "gpu_of", lambda build_only: ("SM120", "a GPU of this test"))
    monkeypatch.setattr(engine.tensorrt_build, "library", lambda: ("tensorrt", fake_tensorrt.FakeTensorRT))


def test_engines_run_with_our_kernels_between_them(gpu):
    """Shapes, addresses, types and the order of results, on a stand-in for TensorRT that computes."""
    model, inputs = model_and_inputs()
    model = model.float()
    made = thresher.compile(model, inputs, "exact", target="tensorrt", dynamic=True)
    assert [e.runs for e in made.report.engines] == [True] * 2
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        calls = ops.get("varlen_attention").calls.total()
        expected, actual = model(**inputs).logits, made(**inputs).logits
        assert ops.get("varlen_attention").calls.total() == calls + 1
        torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
        fewer = {n: t[:2, :9].contiguous() for n, t in inputs.items()}
        torch.testing.assert_close(
            made(**fewer).logits[real[:2, :9]], model(**fewer).logits[real[:2, :9]], rtol=1e-4, atol=1e-4
        )
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        actual, expected = made(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    assert sum(e.rebuilt for e in made.report.engines) == 1  # the one that holds it


def test_a_size_that_an_engine_was_not_built_for_names_the_option(gpu):
    model, inputs = model_and_inputs()
    model = model.float()
    three = [(1, 8), (3, 16), (3, 16)]
    made = thresher.compile(
        model, inputs, "none", target="tensorrt", dynamic=True,
        profiles={"input_ids": three, "attention_mask": three},
    )  # fmt: skip
    longer = {n: t.repeat(1, 2) for n, t in inputs.items()}
    with pytest.raises(ThresherError, match=r"profiles=\{...\}"):
        made(**longer)
    with pytest.raises(ArgumentError, match=r"profiles.*input_ids"):
        thresher.compile(model, inputs, "none", target="tensorrt", profiles={"inputs_id": three})


def test_a_part_moved_to_the_cpu_for_its_export_is_the_same_part():
    """On a machine with a GPU a program's tensors lie there, and are exported from the main memory."""
    import small_programs

    def function(x, w):
        return torch.relu(x @ w) + torch.arange(x.shape[0], device=x.device)[:, None]

    program = small_programs.program(
        function, {"x": torch.randn(3, 8)}, {"w": torch.randn(8, 8)}, {"x": {0: torch.export.Dim.DYNAMIC}}
    )
    assert kept.on_cpu(program) is program
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            with program.fake_mode():
                node.meta["val"] = node.meta["val"].to("meta")
        node.kwargs = {k: torch.device("meta") if k == "device" else v for k, v in node.kwargs.items()}
    moved = kept.on_cpu(program)
    values = [n.meta["val"] for n in moved.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert values and {v.device.type for v in values} == {"cpu"}
    given = torch.randn(5, 8)
    assert torch.equal(
        moved.run(given)[0], function(given, program.weights[next(iter(program.weights))].tensor)
    )


def test_the_engines_module_is_not_made_twice(gpu, monkeypatch):
    """A part's engine is looked for by what it is: a second model with the same layer and weights takes it."""
    model, inputs = model_and_inputs()
    first = thresher.compile(model.float(), inputs, "none", target="tensorrt")
    torch._dynamo.reset()
    monkeypatch.setattr(engine, "build", lambda *_: pytest.fail("it was there"))
    second = thresher.compile(model, inputs, "none", target="tensorrt")
    assert not first.report.engines[0].cached and second.report.engines[0].cached
    assert isinstance(second.sessions[0].target, door.TensorRT)
