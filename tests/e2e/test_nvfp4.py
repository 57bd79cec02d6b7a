"""NVFP4 through the public ways in: compiled models within their budget, fresh weights, named providers."""

import copy

import masks
import pytest
import torch
import zoo

import thresher
from thresher.errors import NothingRewrittenError
from thresher.kernels.nvfp4 import cpu as nvfp4_cpu
from thresher.kernels.nvfp4.quantize import quantize
from thresher.runtime import judge
from thresher.tools import models

ANY = {"min_weights": 0, "budget": 4.0}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name):
    model, inputs = zoo.ZOO[name].build()
    model.config.use_cache = False
    return model, inputs


def first(result):
    return result.logits if "logits" in result else result[0]


def rounded(model, sites, **how):
    """The model with the named linears' weights rounded to NVFP4: what the rewritten one must compute."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in twin.named_modules():
            if name in sites:
                flipped = type(module).__name__ == "Conv1D"
                weight = module.weight.t() if flipped else module.weight
                values = quantize(weight, **how).dequantize()
                module.weight = torch.nn.Parameter(values.t().contiguous() if flipped else values)
    return twin


def same(model, fast, inputs, **how):
    twin = rounded(model, fast.report["nvfp4"].rewritten, **how)
    with torch.no_grad():
        expected = first(twin(**inputs))
    e, a = (masks.at_real_tokens(t, inputs["attention_mask"]) for t in (expected, first(fast(**inputs))))
    return float((e - a).abs().max() / e.abs().max())


@pytest.mark.parametrize(
    "name, count", [("llama", 14), ("gpt2", 8), pytest.param("bert", 13, marks=pytest.mark.thorough)]
)
def test_compiled_models_compute_with_the_rounded_weights(name, count):
    model, inputs = build(name)
    fast = thresher.compile(model, inputs, nvfp4=ANY, target="reference")
    account = fast.report["nvfp4"]
    assert len(account.rewritten) == count and account.error is not None and account.error <= 4
    assert same(model, fast, inputs) < 1e-4


def test_a_budget_that_is_too_small_rolls_back_and_names_the_error(monkeypatch):
    judges, within = [], judge.Judge.within
    monkeypatch.setattr(
        judge.Judge, "within", lambda self, *given: judges.append(self) or within(self, *given)
    )

    def limit():
        """What is said: the budget, and the rounding of both programs, which hangs on the machine's order of sums."""
        rounding = judges[-1].rounding
        assert 0 < rounding < 8 * torch.finfo(torch.float32).eps
        return f"its budget is {1e-6 + (1 + judge.FACTOR) * rounding:.1e}"

    model, inputs = build("llama")
    small = {"min_weights": 0, "budget": 1e-6}
    with pytest.raises(NothingRewrittenError, match="rolled back") as raised:
        thresher.compile(model, inputs, nvfp4=small, target="reference")
    assert limit() in str(raised.value)
    fast = thresher.compile(model, inputs, {"prepack": True, "nvfp4": small}, target="reference")
    account = fast.report["nvfp4"]
    assert not account.rewritten and limit() in account.rolled_back
    real = inputs["attention_mask"] == 1
    with torch.no_grad():
        torch.testing.assert_close(first(fast(**inputs))[real], first(model(**inputs))[real])


def test_scale_search_lowers_the_error_of_the_output():
    model, inputs = build("gpt2")
    errors = {}
    for search in ("none", "mse"):
        fast = thresher.compile(model, inputs, nvfp4={**ANY, "search": search}, target="reference")
        assert same(model, fast, inputs, search=search) < 1e-4
        with torch.no_grad():
            errors[search] = float((first(fast(**inputs)) - first(model(**inputs))).norm())
        torch._dynamo.reset()
    assert errors["mse"] < errors["none"]


def test_weights_replaced_after_compiling_are_packed_anew():
    model, inputs = build("llama")
    fast = thresher.compile(model, inputs, nvfp4=ANY, target="reference")
    other = build("llama")[0]
    generator = torch.Generator().manual_seed(5)
    state = {
        k: v + 0.1 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in other.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    assert same(model, fast, inputs) < 1e-4
    assert sum(c.repacked for c in fast.counters) == 3 * 14
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert same(model, fast, inputs) < 1e-4
    assert sum(c.repacked for c in fast.counters) == 3 * 15


def test_a_tied_head_stays_and_its_embedding_is_untouched():
    model, inputs = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    fast = thresher.compile(model, inputs, nvfp4=ANY, target="reference")
    said = {m.site: m.reason for m in fast.report["nvfp4"].missed}
    assert said["lm_head"] == "It is kept in high precision by keep='head'."
    torch._dynamo.reset()
    fast = thresher.compile(model, inputs, nvfp4={**ANY, "keep": []}, target="reference")
    assert "lm_head" in fast.report["nvfp4"].rewritten
    names = {w.fqn for w in fast.sessions[0].program.weights.values()}
    assert "transformer.wte.weight" in names or "lm_head.weight" in names  # the embedding's copy


def test_it_combines_with_prepacking():
    model, inputs = build("llama")
    fast = thresher.compile(model, inputs, nvfp4=ANY, prepack=True, target="reference")
    assert len(fast.report["nvfp4"].rewritten) == 14 and fast.report["prepack"].rewritten
    assert same(model, fast, inputs) < 1e-4
    assert fast.counters[0].packed


@pytest.mark.skipif(nvfp4_cpu.unavailable() is not None, reason=str(nvfp4_cpu.unavailable()))
def test_the_report_names_the_provider_and_why():
    model, inputs = build("bert")
    fast = thresher.compile(model, inputs, nvfp4=ANY, target="reference")
    assert "thresher::nvfp4_linear runs 13 times on cpu_cpp." in fast.report.notes


def test_without_a_compiler_the_report_says_that_the_reference_runs(monkeypatch):
    op = thresher.ops.get("nvfp4_linear")
    monkeypatch.setitem(op._usable, "cpu_cpp", "No C++ compiler was found.")
    model, inputs = build("bert")
    fast = thresher.compile(model, inputs, nvfp4=ANY, target="reference")
    assert any("on reference. Not cpu_cpp: No C++ compiler" in n for n in fast.report.notes)


@pytest.mark.slow
def test_minilm_through_inductor():
    model, tokenizer = models.minilm()
    batch = models.mixed_length_batch(tokenizer, 3, max_len=24)
    fast = torch.compile(model, backend="thresher", options={"nvfp4": True})
    with torch.no_grad():
        expected, actual = model(**batch)[0], fast(**batch)[0]
    report = thresher.reports()[-1]
    assert report.target == "inductor" and len(report["nvfp4"].rewritten) == 37
    real = batch["attention_mask"].bool()
    similar = torch.nn.functional.cosine_similarity(expected[real], actual[real], dim=-1)
    assert similar.mean() > 0.97 and similar.min() > 0.9


@pytest.mark.slow
def test_smollm2_computes_with_the_rounded_weights_and_its_own_head():
    model, tokenizer = models.smollm2()
    model.config.use_cache = False
    batch = models.mixed_length_batch(tokenizer, 2, max_len=16)
    options = {"nvfp4": True, "target": "reference", "verify": False}
    fast = torch.compile(model, backend="thresher", options=options)
    with torch.no_grad():
        actual = fast(**batch).logits
        account = thresher.reports()[-1]["nvfp4"]
        assert len(account.rewritten) == 210 and [m.site for m in account.missed] == ["lm_head"]
        for name in account.rewritten:
            weight = model.get_submodule(name).weight
            weight.data = quantize(weight).dequantize()
        expected = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert float((actual - expected)[real].abs().max() / expected[real].abs().max()) < 1e-4
