"""RSQ through the front doors: quantize, save, compile, run, on unmodified models."""

import pytest
import torch
import zoo

import thresher
from thresher.errors import ArgumentError, StaleWeightsError, ThresherError
from thresher.passes.calibrate import Statistics


def tokens(rows=16):
    return torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(0))


def compiled(model, inputs, low, **options):
    torch._dynamo.reset()
    return thresher.compile(model, inputs, target="reference", **low.options, **options)


def difference(model, call, inputs):
    with torch.no_grad():
        expected = model(**inputs).logits
    return float((call(**inputs).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "name, cache",
    [
        pytest.param("llama", False, marks=pytest.mark.thorough),
        pytest.param("llama", True, marks=pytest.mark.thorough),
        ("gpt2", False),
        pytest.param("qwen2", False, marks=pytest.mark.thorough),
    ],
)
def test_eight_bits_hardly_change_a_model(tmp_path, name, cache):
    model, inputs = zoo.ZOO[name].build()
    model.config.use_cache = cache
    low = thresher.quantize(model, tokens(), thresher.RSQ(bits=8))
    low.save(tmp_path / "low.safetensors")
    call = compiled(model, inputs, low)
    (account,) = call.report.passes
    assert len(account.rewritten) == len(low.report.linears) and not account.rolled_back
    assert difference(model, call, inputs) < 0.05


def test_a_saved_file_serves_torch_compile_and_the_cache_holds_the_models_own_values(tmp_path):
    model, _ = zoo.ZOO["llama"].build()
    low = thresher.quantize(model, tokens(), {"rsq": {"bits": 8}})
    low.save(tmp_path / "low.safetensors")
    torch._dynamo.reset()
    options = {**low.options, "target": "reference"}
    call = torch.compile(model, backend="thresher", options=options, dynamic=True)
    ids = tokens(2)
    with torch.no_grad():
        ours, theirs = call(ids, use_cache=True), model(ids, use_cache=True)
        for layer in range(2):
            a, b = (o.past_key_values.layers[layer].values for o in (ours, theirs))
            assert float((a - b).norm() / b.norm()) < 0.05
        step = torch.full((2, 1), 5)
        ours = call(step, past_key_values=ours.past_key_values).logits
        theirs = model(step, past_key_values=theirs.past_key_values).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_nvfp4_grid_runs_its_own_operator():
    model, inputs = zoo.ZOO["llama"].build()
    model.config.use_cache = False
    low = thresher.quantize(model, tokens(), thresher.RSQ(grid="nvfp4"))
    call = compiled(model, inputs, low)
    assert "nvfp4_linear" in call.sessions[0].program.text() and difference(model, call, inputs) < 0.6


def test_without_a_file_every_linear_is_a_miss():
    model, inputs = zoo.ZOO["llama"].build()
    found = thresher.explain(model, inputs, rsq={"bits": 3})
    (account,) = found.report.passes
    assert not account.rewritten and len(account.missed) == 15
    assert all("needs calibration" in m.reason for m in account.missed)


def test_other_weights_and_other_options_are_refused(tmp_path):
    model, inputs = zoo.ZOO["llama"].build()
    low = thresher.quantize(model, tokens(), thresher.RSQ(bits=3))
    low.save(tmp_path / "low.safetensors")
    with pytest.raises(ArgumentError, match="bits=2 where the file has 3"):
        torch._dynamo.reset()
        thresher.compile(model, inputs, target="reference", rsq={"bits": 2}, stats=str(low.path))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ThresherError, match="were measured on weights"):
        compiled(model, inputs, low)


def test_a_weight_changed_after_compiling_is_noticed():
    model, inputs = zoo.ZOO["llama"].build()
    call = compiled(model, inputs, thresher.quantize(model, tokens(), thresher.RSQ(bits=8)))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(StaleWeightsError, match=r"up_proj.*Compile the model again"):
        call(**inputs)


def test_file_round_trip_and_report(tmp_path):
    model, _ = zoo.ZOO["llama"].build()
    low = thresher.quantize(model, tokens(), thresher.RSQ(bits=3, symmetric=False))
    path = low.save(tmp_path / "low.safetensors")
    again = Statistics.load(path)
    for site, named in low.statistics.tensors["rsq"].items():
        for part, tensor in named.items():
            assert torch.equal(tensor, again.tensors["rsq"][site][part])
    said = str(low.report)
    assert "rotation alone" in said and "model.layers.0.mlp.down_proj" in said and "R4: Hadamard" in said
    assert low.report.file_bytes == path.stat().st_size
    pytest.importorskip("matplotlib")
    assert low.report.plot(tmp_path / "report.svg").stat().st_size > 1000


class Tokenizer:
    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[3 + ord(c) % 80 for c in text]])}


def test_data_may_be_strings_a_loader_or_neither():
    model, _ = zoo.ZOO["llama"].build()
    texts = ["a sentence of some length, and another one"] * 8
    low = thresher.quantize(model, texts, thresher.RSQ(bits=4), tokenizer=Tokenizer(), length=12, sequences=6)
    assert low.report.tokens == 72
    ids = tokens(4)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    loader = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:2, :9], "attention_mask": mask[:2, :9]},
    ]
    low = thresher.quantize(model, loader, thresher.RSQ(bits=4))
    assert low.report.tokens == int(mask.sum() + mask[:2, :9].sum())
    for data, match in ((["short"], "at least one sequence"), (torch.randn(2, 3), "integer token ids"), (3, "data"),
                        ("text", "list of strings")):  # fmt: skip
        with pytest.raises(ArgumentError, match=match):
            thresher.quantize(model, data, thresher.RSQ(), tokenizer=Tokenizer(), length=12)
    with pytest.raises(ArgumentError, match="tokenizer"):
        thresher.quantize(model, texts)
    with pytest.raises(ArgumentError, match="RSQ"):
        thresher.quantize(model, ids, {"prepack": True})
    with pytest.raises(ArgumentError, match="eval mode"):
        thresher.quantize(model.train(), ids)


def test_shifted_copies_multiply_the_sequences():
    model, _ = zoo.ZOO["llama"].build()
    assert thresher.quantize(model, tokens(3), thresher.RSQ(expand=2)).report.tokens == 72


@pytest.mark.slow
def test_behind_deft_unrotated_codes_serve_and_rotated_ones_say_what_to_do(tmp_path):
    model, inputs = zoo.ZOO["llama_reglu"].build()[0], dict(zoo.ZOO["llama_reglu"].inputs())
    both = {"deft": {"min_bytes": 0}, "rsq": {"budget": 1.0}}
    for options, expected in ((dict(rotate=False, rotate_down=False), 10), ({}, 0)):
        low = thresher.quantize(model, [inputs], thresher.RSQ(bits=8, **options))
        path = low.save(tmp_path / f"{expected}.safetensors")
        compiled = thresher.compile(model, inputs, recipe=both, stats=str(path), target="reference")
        deft, rsq = compiled.report.passes
        assert (len(deft.rewritten), len(rsq.rewritten)) == (2, expected)
    assert any("rotate=False" in m.reason for m in rsq.missed)
