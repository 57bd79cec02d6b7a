"""The NVFP4 pass: what it rewrites and what it leaves and why, packed weights, kept layers, calibration."""

import captures
import pytest
import torch
import zoo

import thresher
from thresher import backend
from thresher.errors import ArgumentError
from thresher.formats.nvfp4 import dequantized
from thresher.graph.program import Weight
from thresher.kernels.nvfp4.quantize import quantize
from thresher.passes.nvfp4.calibration import InputStatistics, sensitivity
from thresher.passes.nvfp4.nvfp4 import NVFP4Config
from thresher.recipe import Recipe

NVFP4_LINEAR = torch.ops.thresher.nvfp4_linear.default
aten = torch.ops.aten
LINEARS = (aten.linear.default, aten.addmm.default, aten.mm.default)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(name="llama", way="export", program=None, **options):
    program = program or captures.of_zoo(name, way)
    inputs = None if "dynamic" in way else captures.arguments(program, zoo.ZOO[name].build()[1])
    recipe = Recipe.of(nvfp4={"min_weights": 0, "budget": 4.0, **options}, verify=False)
    after, report = backend.run_pipeline(program, recipe, inputs)
    return after, report["nvfp4"]


def reasons(account):
    return {m.site: m.reason for m in account.missed}


@pytest.mark.parametrize(
    "name, way",
    [
        *((name, "export") for name in ("bert", "phi3", "bloom", "t5_encoder", "vit")),
        ("llama", "dynamo"),
        ("gpt2", "dynamo-dynamic"),
    ],
)
def test_every_linear_but_the_head_becomes_one_node(name, way):
    before = captures.of_zoo(name, way)
    after, account = run(name, way)
    left = len(after.nodes(*LINEARS))
    assert len(after.nodes(NVFP4_LINEAR)) == len(account.rewritten) == len(before.nodes(*LINEARS)) - left
    assert left == (0 if name in ("bert", "t5_encoder", "vit") else 1), after.text()
    kernels = [m.site for m in account.missed if "aten.conv" in m.reason]
    assert (
        account.coverage > 0.7
        and len(account.missed) == left + len(kernels)
        and len(kernels) == (name == "vit")
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bert"])
def test_results_are_those_of_the_rounded_weights(name):
    program = captures.of_zoo(name)
    inputs = captures.arguments(program, zoo.ZOO[name].build()[1])
    after, account = run(name)
    rounded = program.copy()
    packed = {w.source[0] for w in after.weights.values() if w.source}
    assert len(packed) == len(account.rewritten)
    for key, held in rounded.weights.items():
        if held.fqn in packed:
            flipped = name == "gpt2"  # Conv1D keeps [in, out]
            values = quantize(held.tensor.t() if flipped else held.tensor).dequantize()
            values = values.t().contiguous() if flipped else values
            rounded.weights[key] = Weight(held.fqn, values)
            rounded.graph_module.register_buffer(key, values, persistent=False)
    for expected, actual in zip(rounded.run(*inputs), after.run(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_packed_weights_replace_the_model_s():
    after, _ = run()
    assert not any(w.fqn.endswith(("q_proj.weight", "down_proj.weight")) for w in after.weights.values())
    held = {w.fqn: w for w in after.weights.values()}
    codes = held["model.layers.0.mlp.up_proj.weight.nvfp4_codes"]
    assert codes.tensor.dtype == torch.uint8 and codes.tensor.shape == (48, 16)
    assert held["model.layers.0.mlp.down_proj.weight.nvfp4_block_scales"].tensor.shape == (32, 3)
    assert codes.source == ("model.layers.0.mlp.up_proj.weight",)


def test_derived_weights_are_recomputed_from_the_source():
    after, _ = run(search="mse")
    parts = [w for w in after.weights.values() if w.source == ("model.layers.1.self_attn.o_proj.weight",)]
    new = torch.randn(32, 32)
    q = quantize(new, search="mse")
    for part, expected in zip(
        parts, (q.codes, q.block_scales.view(torch.uint8), q.global_scale), strict=True
    ):
        assert torch.equal(part.derive(new), expected)
    with torch.no_grad():
        new.mul_(2)
    assert torch.equal(parts[2].derive(new), quantize(new, search="mse").global_scale)


class Tails(torch.nn.Module):
    """K of 20 and 37: not multiples of 16; a head of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(20, 37), torch.nn.Linear(37, 20, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


@pytest.mark.parametrize("rows", [(2, 3), (1,), (0,)])
@pytest.mark.parametrize("activations", ["exact", "int8", "nvfp4"])
def test_tails_of_k_and_a_linear_that_reads_another(rows, activations):
    model = Tails().eval()
    x = torch.randn(*rows, 20)
    options = {"min_weights": 0, "budget": 2.0, "activations": activations, "keep": []}
    fast = thresher.compile(model, (x,), nvfp4=options, target="reference")
    assert len(fast.report["nvfp4"].rewritten) == 2
    expected = x
    for layer in (model.up, model.down):
        q = quantize(layer.weight)
        linear = torch.ops.thresher.nvfp4_linear
        expected = linear(expected, q.codes, q.block_scales, q.global_scale, None, layer.bias, activations)
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "keep, kept",
    [
        (["first"], {"model.layers.0"}),
        (["last:1"], {"model.layers.1"}),
        (["first:2"], {"model.layers.0", "model.layers.1"}),
        (["*.mlp.down_proj"], {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
    ],
)
def test_kept_layers(keep, kept):
    _, account = run(keep=keep)
    for site, reason in reasons(account).items():
        assert any(site.startswith(k) for k in kept) and f"keep={keep[0]!r}" in reason
    assert all(not any(s.startswith(k) for k in kept) for s in account.rewritten)
    assert "lm_head" in account.rewritten  # not named, so not kept


def test_a_keep_pattern_that_names_nothing_is_said():
    _, account = run(keep=["*.no_such_layer"])
    assert any("*.no_such_layer" in n and "names no linear" in n for n in account.notes)


def test_small_linears_are_left_with_the_numbers():
    _, account = run(min_weights=1500)
    assert reasons(account)["model.layers.0.self_attn.q_proj"].startswith("Its 32 x 32 = 1024 weights")
    assert "model.layers.0.mlp.up_proj" in account.rewritten


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    model, inputs = zoo.ZOO["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    _, account = run(program=captures.export(model, inputs))
    said = reasons(account)
    assert said["model.layers.1.mlp.up_proj"].startswith(
        "model.layers.1.mlp.up_proj.weight has 1 NaN or infinite"
    )
    assert len(account.rewritten) == 13


def test_models_without_weights_are_explained():
    with torch.device("meta"):
        model = zoo.ZOO["llama"].make()
    inputs = zoo.ZOO["llama"].build()[1]
    found = thresher.explain(model.eval(), inputs, nvfp4={"min_weights": 0})
    assert len(found.report["nvfp4"].rewritten) == 14


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "tee"}, "Did you mean 'te'"),
        ({"search": "mae"}, "mse"),
        ({"activations": "int4"}, "int8"),
        ({"keep": "head"}, r"keep=\['head'\]"),
        ({"keep": ["first:x"]}, "first:N"),
        ({"input_scale": "calibrated"}, "activations='nvfp4'"),
        ({"sensitive": 2.0}, "0 to 1"),
        ({"budgets": 2.0}, "Did you mean 'budget'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        Recipe.of(nvfp4=options)


def test_without_calibration_the_report_asks_for_it():
    for options in ({"sensitive": 0.2}, {"activations": "nvfp4", "input_scale": "calibrated"}):
        _, account = run(**options)
        assert not account.rewritten and "thresher.calibrate" in account.missed[0].reason


def test_calibrated_activations_and_sensitive_layers(tmp_path):
    model, inputs = zoo.ZOO["llama"].build()
    model.config.use_cache = False
    batches = [inputs, {k: v[:2] for k, v in inputs.items()}]
    options = {"min_weights": 0, "budget": 4.0, "activations": "nvfp4", "input_scale": "calibrated",
               "sensitive": 0.2, "keep": ["head", "*.k_proj"]}  # fmt: skip
    stats = thresher.calibrate(model, batches, nvfp4=options)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    torch._dynamo.reset()
    fast = thresher.compile(model, inputs, nvfp4=options, stats=str(path), target="reference")
    account, program = fast.report["nvfp4"], fast.sessions[0].program
    said = reasons(account)
    sensitive = [s for s, reason in said.items() if "most sensitive" in reason]
    assert sensitive and " %;" in said[sensitive[0]] and not any("k_proj" in s for s in sensitive)
    held = {w.fqn: w.tensor for w in program.weights.values()}
    for site in account.rewritten:
        amax = stats["nvfp4"][site]["amax"]
        assert torch.equal(held[f"{site}.input_scale"], amax / 2688)


def test_statistics_look_at_real_tokens_only():
    value, real = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    value[~real] = 100.0
    seen = InputStatistics()
    seen.add(value, real)
    seen.add(3 * torch.ones(1, 4), real)  # a pooled row
    found = seen.result()
    assert found["amax"] == 3 and torch.allclose(found["square_mean"], torch.full((4,), 3.0))


def test_sensitivity_is_the_error_of_the_output():
    torch.manual_seed(0)
    weight = torch.randn(64, 48) * torch.logspace(0, 1, 48)
    x = torch.randn(20_000, 48) * torch.logspace(1, 0, 48)
    rounded = quantize(weight).dequantize()
    quantizer = torch.ops.thresher.nvfp4_quantize
    assert torch.equal(dequantized(*quantizer(weight)), rounded)
    measured = float((x @ (rounded - weight).t()).norm() / (x @ weight.t()).norm())
    assert abs(sensitivity(weight, x.square().mean(0), quantizer) / measured - 1) < 0.02


def test_configs_are_values():
    assert NVFP4Config(keep=("head", "router")) == NVFP4Config()
    assert (
        Recipe.of(nvfp4={"keep": ["first", "last"]}).fingerprint()
        == Recipe.of(nvfp4={"keep": ("first", "last")}).fingerprint()
    )


def test_a_recipe_after_speed_leaves_what_the_cost_model_expects_to_lose():
    program = captures.of_zoo("llama")
    inputs = captures.arguments(program, zoo.ZOO["llama"].build()[1])
    recipe = Recipe.of(nvfp4={"min_weights": 0}, verify=False, min_gain=1e9)
    account = backend.run_pipeline(program, recipe, inputs)[1]["nvfp4"]
    assert not account.rewritten and any("min_gain" in m.reason for m in account.missed)
