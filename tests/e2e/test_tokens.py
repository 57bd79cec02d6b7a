"""Token passes on whole models: vision-language models as Hugging Face has them, generation, second turns."""

import captures
import pytest
import torch
import zoo
from tiny_llama import IMAGE, make, prompt

import thresher
from thresher.backend import run_pipeline
from thresher.generation.prefill import prefill
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime.compare import run_plainly
from thresher.runtime.kv.cache import MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy
from thresher.sessions import collect

PRUNE = dict(min_image_tokens=2, bucket=1, min_saving=-1.0)
ZIP = dict(keep=0.4, recent=4, spread=4, bucket=4, min_saving=-9.0)
WHOLE = KVPolicy(bits=None, important=1.0, drop=True)  # full precision, each layer at its own length


@pytest.fixture(scope="module")
def llama():
    return make(num_hidden_layers=2)


def _compile(model, inputs, **recipe):
    torch._dynamo.reset()
    return thresher.compile(model, inputs, target="reference", **recipe)


def _pruning(**options):
    return dict(transprune={**PRUNE, "image_token_id": IMAGE, **options})


@pytest.mark.filterwarnings("ignore::thresher.ThresherWarning")
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.thorough) for n in ("llava", "qwen2_vl")), "qwen2_5_vl"]
)
@torch.no_grad()
def test_vision_language_models_as_they_are(name):
    model, inputs = zoo.BESIDE[name]() if name in zoo.BESIDE else zoo.ZOO[name].build()
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    expected = model(**inputs).logits
    torch._dynamo.reset()
    options = {"transprune": dict(PRUNE, stages=((1, 0.5),)), "target": "reference"}
    compiled = torch.compile(model, backend="thresher", options=options)
    with collect() as made:
        out = compiled(**inputs)
    (report,) = [s.report["transprune"] for s in made if "kept.1" in getattr(s, "extras", {})]
    assert report.rewritten
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths == [12, 10], "two of four image tokens are gone behind the first layer"
    assert out.logits.shape == expected.shape
    assert out.logits[:, -1].isfinite().all()


@pytest.mark.thorough  # of decoders alone, tests/passes/transprune/test_transprune.py has it bit by bit
@pytest.mark.filterwarnings("ignore::thresher.ThresherWarning")
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_vision_language_models_of_which_all_is_kept_are_as_they_were(name):
    model, inputs = zoo.BESIDE[name]() if name in zoo.BESIDE else zoo.ZOO[name].build()
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    alike = {"transprune": dict(PRUNE, stages=((1, 1.0),), always=True), "target": "reference"}
    torch._dynamo.reset()
    same = torch.compile(model, backend="thresher", options=alike)(**inputs).logits
    torch.testing.assert_close(same, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough  # tests/core/generation/test_generate.py has it with the cache that is made by itself
@torch.no_grad()
def test_generation_behind_a_prefill_that_kept_all_is_the_models_own(llama):
    ids = prompt()
    expected = llama.generate(ids, max_new_tokens=8, do_sample=False)
    inputs = dict(input_ids=ids)
    call = _compile(llama, {**inputs, "use_cache": True}, **_pruning(stages=((1, 1.0),), always=True))
    cache = MixedPrecisionCache(llama.config, WHOLE)
    assert torch.equal(call.generate(**inputs, cache=cache, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("restore", [pytest.param("zeros", marks=pytest.mark.thorough), "none"])
@torch.no_grad()
def test_a_second_turn_of_several_tokens_on_the_pruned_cache(llama, restore):
    """Right-aligned, at the positions the unpruned prompt leaves off."""
    ids, more = prompt(), prompt()[:, 38:45]
    call = _compile(
        llama, dict(input_ids=ids, use_cache=True), **_pruning(stages=((1, 0.25),), restore=restore)
    )
    cache = MixedPrecisionCache(llama.config, WHOLE)
    out = prefill(call, dict(input_ids=ids), cache)
    assert cache.lengths == [48, 24] and cache.get_seq_length() == 48
    past = out.past_key_values
    inner, hidden = llama.model, llama.model.embed_tokens(more)
    rotary = inner.rotary_emb(hidden, torch.arange(48, 55)[None])
    for index, layer in enumerate(inner.layers):
        held = past.layers[index].keys.shape[2]
        mask = torch.ones(7, held + 7, dtype=torch.bool).tril(held)[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=past)
    expected = llama.lm_head(inner.norm(hidden))
    llama.set_attn_implementation("thresher_kv")
    try:
        actual = llama(more, past_key_values=cache).logits
    finally:
        llama.set_attn_implementation("sdpa")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kv, lengths", [("drop", [55 - 28] * 2), pytest.param("quantize", [55] * 2, marks=pytest.mark.thorough)]
)
@torch.no_grad()
def test_generation_behind_zipvl(llama, kv, lengths):
    """v2 forgets what is unimportant; v1 keeps it at fewer bits, as the cache's policy says."""
    ids = prompt()
    options = dict(ZIP, kv=kv, image_token_id=IMAGE, keep=0.1)
    call = _compile(llama, dict(input_ids=ids, use_cache=True), zipvl=options)
    cache = MixedPrecisionCache(llama.config, WHOLE if kv == "drop" else KVPolicy(important=0.5, block=16))
    text = call.generate(input_ids=ids, cache=cache, max_new_tokens=8, do_sample=False)
    assert text.shape == (2, 56) and cache.get_seq_length() == 55
    assert cache.lengths == lengths
    if kv == "quantize":
        assert [pool.bits for pool in cache.layers[0].pools] == [4, 2]


@torch.no_grad()
def test_with_quantized_weights(llama):
    """Later passes rewrite the pruned program's linears."""
    ids = prompt()
    inputs = dict(input_ids=ids, use_cache=False)
    pruned = _compile(llama, inputs, **_pruning(stages=((1, 0.5),), policy="uniform"), verify=False)
    quantized = dict(nvfp4={"min_weights": 0}, verify=False)
    call = _compile(llama, inputs, **_pruning(stages=((1, 0.5),), policy="uniform"), **quantized)
    assert call.report["transprune"].rewritten and call.report["nvfp4"].rewritten
    expected, actual = pruned(**inputs).logits, call(**inputs).logits
    assert torch.equal(actual == 0, expected == 0), "the same tokens are left out"
    kept = expected != 0
    assert torch.nn.functional.cosine_similarity(actual[kept], expected[kept], dim=0) > 0.9


@pytest.fixture(scope="module")
def mixed():
    """A padded batch of other image counts, and its program; each row alone, and its program."""
    ids = prompt(2)
    mask = torch.ones_like(ids)
    ids[1, 4:20] = 7  # 16 image tokens instead of 32
    mask[0, 44:] = 0
    together = dict(input_ids=ids, attention_mask=mask)
    alone = [dict(input_ids=ids[row : row + 1, mask[row].bool()]) for row in range(2)]
    model = make()  # whose third layer has tokens left out once more
    return [(i, captures.export(model, i, dynamic=i is together)) for i in (together, *alone)]


@pytest.mark.parametrize("policy", ["transprune", pytest.param("fastv", marks=pytest.mark.thorough)])
@torch.no_grad()
def test_with_prepacking_each_row_is_pruned_as_alone(mixed, policy):
    """Budgets, probes and softmax of each packed sequence are its own."""
    recipe = _pruning(stages=((1, 0.5), (2, 0.25)), policy=policy, instruction=4)
    (together, program), *alone = mixed

    def run(program, inputs, **more):
        given = captures.arguments(program, inputs)
        after, report = run_pipeline(program, Recipe.of(None, verify=False, **more, **recipe), given)
        assert all(p.rewritten for p in report.passes), report
        return run_plainly(after, given, Reference())[0]

    packed = run(program, together, prepack=True)
    for row, (inputs, program) in enumerate(alone):
        real = together["attention_mask"][row].bool()
        torch.testing.assert_close(packed[row : row + 1, real], run(program, inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_behind_zipvl_on_packed_prompts(llama):
    """Prompts of other lengths are prefilled packed, with as many tokens important as there are."""
    ids = prompt(2, span=None)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    expected = llama.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    options = dict(ZIP, keep=1.0, kv="quantize")
    call = _compile(llama, {**inputs, "use_cache": True}, prepack=True, zipvl=options)
    assert call.report["prepack"].rewritten and call.report["zipvl"].rewritten
    cache = MixedPrecisionCache(llama.config, WHOLE)
    assert torch.equal(call.generate(**inputs, cache=cache, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.thorough), True])
@torch.no_grad()
def test_inductor_agrees(packed):
    """Pruned; and packed with ZipVL, whose program is told the number of tokens that attend with each call."""
    model, ids = make(num_hidden_layers=1 if packed else 2), prompt()
    inputs = dict(input_ids=ids, use_cache=False)
    recipe = _pruning(stages=((1, 0.5),))
    if packed:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][1, 30:] = 0
        recipe = dict(prepack=True, zipvl=dict(ZIP, image_token_id=IMAGE))
    plain = _compile(model, inputs, **recipe)
    torch._dynamo.reset()
    call = thresher.compile(model, inputs, **recipe)
    for _ in range(2):
        torch.testing.assert_close(call(**inputs).logits, plain(**inputs).logits, rtol=1e-3, atol=1e-4)
        if packed:
            inputs["attention_mask"][1, 20:] = 0
    assert len(call.sessions) == 1 and call.counters[0].lowered == 1
