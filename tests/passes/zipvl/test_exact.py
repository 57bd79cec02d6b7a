"""ZipVL with exact counts: tau is held in every call and layer, by one program."""

import pytest
import tiny_llama
import torch
import zip_by_hand
from tiny_llama import IMAGE, make
from zip_by_hand import OPTIONS

import thresher
from thresher.errors import ArgumentError, ThresherError
from thresher.lowering.inductor.inductor import Inductor
from thresher.runtime.kv.cache import MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy

EXACT = dict(OPTIONS, counts="exact", tau=0.8)


@pytest.fixture(scope="module")
def model():
    return zip_by_hand.make_model(2)


def compiled(model, inputs, dynamic=None, target="reference", **recipe):
    torch._dynamo.reset()
    return thresher.compile(model, inputs, target=target, dynamic=dynamic, **recipe)


@pytest.mark.parametrize("gather, dynamic", [("projections", True), ("attention", False)])
@torch.no_grad()
def test_tau_is_held_with_as_few_tokens_as_do(model, gather, dynamic):
    ids = tiny_llama.prompt(2, 60, span=None)
    call = compiled(
        model, dict(input_ids=ids, use_cache=True), dynamic, zipvl=dict(EXACT, gather=gather, kv="drop")
    )
    assert call.report["zipvl"].rewritten and "0.8 of the attention" in " ".join(call.report["zipvl"].notes)
    counts = set()
    for seed in range(3):
        call(input_ids=tiny_llama.prompt(2, 60, seed, span=None), use_cache=True)
        extras = call.sessions[-1].extras
        assert ((extras["realised_tau"] >= 0.8) & (extras["realised_tau"] < 0.95)).all()
        counts |= {extras[f"important.{layer}"].shape[1] for layer in range(2)}
    assert len(counts) > 1 and len(call.sessions) == 1 and call.counters[0].lowered == 1


@torch.no_grad()
def test_padding_is_never_counted(model):
    ids = tiny_llama.prompt(2, 60, span=None)
    wide = torch.cat([torch.zeros(2, 10, dtype=torch.long), ids], 1)
    mask = torch.ones_like(wide)
    mask[:, :10] = 0
    inputs = dict(
        input_ids=wide, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False
    )
    padded = compiled(model, inputs, zipvl=EXACT)(**inputs).logits[:, 10:]
    alone = compiled(model, dict(input_ids=ids, use_cache=False), zipvl=EXACT)
    torch.testing.assert_close(padded, alone(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    expected, _ = zip_by_hand.run(model, ids[1:], 0.8)
    torch.testing.assert_close(padded[1:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_behind_a_cut_and_before_quantized_weights(model):
    ids = tiny_llama.prompt()
    inputs = dict(input_ids=ids, use_cache=False)
    prune = dict(image_token_id=IMAGE, min_image_tokens=8, bucket=1, min_saving=0.0, stages=((1, 0.75),))
    zipvl = dict(EXACT, image_token_id=IMAGE)
    call = compiled(model, inputs, transprune=prune, zipvl=zipvl, nvfp4={"min_weights": 0}, verify=False)
    assert all(p.rewritten for p in call.report.passes), call.report
    assert (call.sessions[-1].extras["realised_tau"] >= 0.8).all()
    assert call(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_generation_goes_on_from_as_many_keys_as_each_row_needed(model):
    ids = tiny_llama.prompt(2, 60, span=None)
    call = compiled(model, dict(input_ids=ids, use_cache=True), zipvl=dict(EXACT, tau=1.0, kv="drop"))
    cache = MixedPrecisionCache(model.config, KVPolicy(bits=None, important=1.0, drop=True))
    text = call.generate(input_ids=ids, cache=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(text, model.generate(ids, max_new_tokens=4, do_sample=False)), (
        "tau 1 keeps all that is seen"
    )


@torch.no_grad()
def test_what_needs_sizes_beforehand_refuses(model, tmp_path):
    ids = tiny_llama.prompt(2, 60, span=None)
    inputs = dict(input_ids=ids, use_cache=False)
    call = compiled(model, inputs, zipvl=EXACT)
    with pytest.raises(ArgumentError, match="counts='bucketed'"):
        thresher.save(call, tmp_path / "never", example_inputs=inputs)
    with pytest.raises(ArgumentError, match="counts='bucketed'"):
        thresher.export_onnx(call.sessions[-1].program, inputs, tmp_path / "never.onnx")
    with pytest.raises(ThresherError, match="CUDA graph has fixed sizes"):
        Inductor({"triton.cudagraphs": True}).lower(call.sessions[-1].program)
    with pytest.raises(ArgumentError, match="None with counts='exact'"):
        thresher.Recipe.of(None, zipvl=dict(counts="exact", keep=0.5))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    packed = compiled(model, dict(inputs, attention_mask=mask), prepack=True, zipvl=EXACT).report["zipvl"]
    assert not packed.rewritten and "counts='exact' would count inside it" in packed.missed[0].reason


@pytest.mark.slow
@torch.no_grad()
def test_inductor_makes_one_graph_for_all_requests():
    model = make(num_hidden_layers=1, initializer_range=0.2)
    prompts = [
        dict(input_ids=tiny_llama.prompt(2, 60, seed, span=None), use_cache=False) for seed in range(4)
    ]
    plain = compiled(model, prompts[0], zipvl=EXACT)
    expected = [plain(**inputs).logits for inputs in prompts]
    torch._dynamo.utils.counters.clear()
    call = compiled(model, prompts[0], target="inductor", zipvl=EXACT)
    for inputs, logits in zip(prompts, expected, strict=True):
        torch.testing.assert_close(call(**inputs).logits, logits, rtol=1e-3, atol=1e-4)
        assert (call.sessions[0].extras["realised_tau"] >= 0.8 - 1e-6).all()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len(call.sessions) == 1 and call.counters[0].lowered == 1
