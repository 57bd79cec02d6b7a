"""One way to generate: tokens as transformers makes them, whatever the recipe, the cache, the padding and the mode."""

import threading
import warnings

import pytest
import torch
from tiny_llama import IMAGE, TOKENS, make, prompt
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

import thresher
from thresher.compiled import Compiled
from thresher.errors import ArgumentError
from thresher.recipe import Recipe
from thresher.runtime.kv.cache import MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy

GREEDY = dict(max_new_tokens=6, do_sample=False)
PRUNE = dict(min_image_tokens=2, bucket=1, min_saving=0.0, image_token_id=IMAGE, stages=((1, 0.5),))


@pytest.fixture(scope="module")
def model():
    return make(num_hidden_layers=2)


@pytest.fixture(scope="module")
def whole(model):
    """Compiled with token pruning that keeps all, so that every result is the model's own."""
    options = {**PRUNE, "stages": ((1, 1.0),), "always": True}
    return thresher.compile(model, padded(), target="reference", transprune=options)


@pytest.fixture(scope="module")
def pruned(model):
    return thresher.compile(model, padded(), target="reference", transprune=PRUNE)


def padded(side: str = "left") -> dict[str, torch.Tensor]:
    ids = prompt(2)
    mask = torch.ones_like(ids)
    if side == "left":
        ids[1] = torch.cat([ids[1, :8] * 0, ids[1, :40]])
        mask[1, :8] = 0
    return dict(input_ids=ids, attention_mask=mask)


MODES = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "several beams": dict(num_beams=3, num_return_sequences=2),
    "a static cache": dict(cache_implementation="static"),
}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_left_out_gives_the_models_own_tokens(model, whole, mode):
    for inputs in (padded(), padded("none"), dict(input_ids=prompt(1))):
        given = {**inputs, **GREEDY, **MODES[mode]}
        assert torch.equal(whole.generate(**given), model.generate(**given)), mode


def test_samples_are_drawn_as_the_model_draws_them(model, whole):
    given = dict(input_ids=prompt(1), do_sample=True, max_new_tokens=6, num_return_sequences=3)
    torch.manual_seed(1)
    expected = model.generate(**given)
    torch.manual_seed(1)
    assert torch.equal(whole.generate(**given), expected)


@pytest.mark.parametrize("by", ["prompt lookup", pytest.param("an assistant", marks=pytest.mark.thorough)])
def test_drafts_are_taken_back(model, whole, by):
    """Several tokens a step, and a cache that goes back."""
    ids = prompt(1, span=None)
    lookup = by == "prompt lookup"
    draft = dict(prompt_lookup_num_tokens=3) if lookup else dict(assistant_model=make(num_hidden_layers=1))
    assert torch.equal(whole.generate(ids, **GREEDY, **draft), model.generate(ids, **GREEDY))


def test_a_streamer_hears_every_token(whole):
    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    heard = Heard()
    out = whole.generate(prompt(1), streamer=heard, **GREEDY)
    assert heard.ended and heard.tokens == out[0].tolist()


def test_a_model_whose_generate_calls_another_says_so():
    peft = pytest.importorskip("peft")
    base = make(num_hidden_layers=1)
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    inputs, options = dict(input_ids=prompt(1)), dict(max_new_tokens=2, do_sample=False)
    expected = wrapped.generate(**inputs, **options)
    for model, calls in ((wrapped, 0), (wrapped.get_base_model(), 2)):
        fast = Compiled(model, Recipe.of("none"), target="reference")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert torch.equal(fast.generate(**inputs, **options), expected)
        assert sum(c.calls for c in fast.counters) == calls
        assert any("get_base_model" in str(w.message) for w in said) == (not calls)


def test_a_cache_of_ours_is_not_given_to_another_model():
    """As Blip2's generate does, which calls its language model's."""
    inner = make(num_hidden_layers=1)

    class Outer(type(inner)):
        def generate(self, *args, **kwargs):
            return inner.generate(*args, **kwargs)

    outer = Outer(inner.config).eval()
    fast = Compiled(outer, Recipe.of(None, transprune=PRUNE), target="reference")
    with pytest.raises(ArgumentError, match="a Outer, whose generate calls another model") as refused:
        fast.generate(prompt(1), **GREEDY)
    assert refused.value.argument == "model" and "language_model" in str(refused.value)


def _noted(model):
    """What a model holds, but for the length of its last static cache."""
    return {k: v for k, v in model.__dict__.items() if k != "_previous_max_cache_length"}


def test_several_generate_with_one_model_at_once(model, whole):
    """From threads, and one inside another; the model itself is called meanwhile, and left as it was."""
    prompts = [prompt(1 + n % 2, TOKENS - n, seed=n) for n in range(4)]
    before = _noted(model)
    expected = [model.generate(p, **GREEDY) for p in prompts]

    class Within(BaseStreamer):
        put = end = staticmethod(lambda *_: inner.append(whole.generate(prompts[1], **GREEDY)))

    inner = []
    assert torch.equal(whole.generate(prompts[0], streamer=Within(), **GREEDY), expected[0])
    assert len(inner) > GREEDY["max_new_tokens"] and all(torch.equal(i, expected[1]) for i in inner)
    results, calls = {}, {}

    def work(n):
        for _ in range(3):
            results[n] = torch.equal(whole.generate(prompts[n], **GREEDY), expected[n])
            calls[n] = model(prompts[n]).logits.shape

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert list(results.values()) == [True] * 4 == [len(shape) == 3 for shape in calls.values()]
    assert _noted(model) == before
    assert model.config._attn_implementation == "sdpa"


def test_rows_of_a_pruned_batch_generate_as_alone(pruned):
    """Left-padded, and logits too: positions come from the mask, and left over places from nowhere."""
    asked = dict(**GREEDY, return_dict_in_generate=True, output_logits=True)
    inputs = padded()
    together = pruned.generate(**inputs, **asked)
    assert pruned.last_call.kept == [[48, 40], [32, 24]] and pruned.last_call.tokens_in == [48, 40]
    for row, start in ((0, 0), (1, 8)):
        alone = pruned.generate(input_ids=inputs["input_ids"][row : row + 1, start:], **asked)
        assert torch.equal(alone.sequences[0], together.sequences[row, start:])
        for one, other in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(one[0], other[row], rtol=1e-4, atol=1e-4)


def test_a_second_turn_on_the_cache_of_the_first(model, whole):
    ids, more = prompt(1), prompt(1, 7, seed=5, span=None)
    first = whole.generate(ids, **GREEDY, return_dict_in_generate=True)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    longer = torch.cat([first.sequences, more], 1)
    expected = model.generate(longer, **GREEDY)
    with pytest.raises(ArgumentError, match="generate of the compiled model"):
        model.generate(longer, past_key_values=cache, **GREEDY)
    cache = (
        whole.generate(ids, **GREEDY, return_dict_in_generate=True)["cache"] if "cache" in first else cache
    )
    assert torch.equal(whole.generate(longer, past_key_values=cache, **GREEDY), expected)
    assert model.config._attn_implementation == "sdpa"


def test_images_behind_a_call_of_text_alone_are_pruned(model):
    """The first call's program says nothing of those that come."""
    fast = Compiled(model, Recipe.of(None, transprune=PRUNE), target="reference")
    text, more = padded(), dict(max_new_tokens=2, do_sample=False)
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == IMAGE, 5)
    assert torch.equal(fast.generate(**text, **more), model.generate(**text, **more))
    assert fast.last_call.kept == [[48, 40], [48, 40]]
    fast.generate(**padded(), **more)
    assert fast.last_call.kept == [[48, 40], [32, 24]]


REFUSED = {
    "cache_implementation": dict(cache_implementation="offloaded"),
    "use_cache": dict(use_cache=False),
    "prefill_chunk_size": dict(prefill_chunk_size=8),
    "output_attentions": dict(output_attentions=True, return_dict_in_generate=True),
    "cache": dict(past_key_values=DynamicCache()),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_cannot_work_is_refused_before_a_token(pruned, argument):
    calls = [s.counters.calls for s in pruned.sessions]
    with pytest.raises(ArgumentError) as refused:
        pruned.generate(prompt(1), **GREEDY, **REFUSED[argument])
    assert refused.value.argument == argument
    assert [s.counters.calls for s in pruned.sessions] == calls


def test_a_static_cache_of_the_callers_is_refused_too(model, pruned):
    static = StaticCache(config=model.config, max_cache_len=80)
    with pytest.raises(ArgumentError, match="an empty StaticCache"):
        pruned.generate(prompt(1), past_key_values=static, **GREEDY)


def test_quantize_alone_is_enough(model):
    """The cache is made by itself; its steps are one program; drafts cannot be taken back from codes."""
    options = dict(
        keep=0.5, recent=4, spread=4, bucket=4, min_saving=0.0, kv="quantize", image_token_id=IMAGE
    )
    fast = thresher.compile(model, padded(), target="reference", zipvl=options)
    asked = dict(**GREEDY, return_dict_in_generate=True)
    out = fast.generate(**padded(), **asked)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    assert isinstance(cache, MixedPrecisionCache)
    assert [[pool.bits for pool in layer.pools] for layer in cache.own] == [[4, 2]] * 2
    assert fast.last_call.bytes < 0.8 * fast.last_call.dense_bytes and len(fast.last_call.tau) == 2
    with pytest.raises(ArgumentError, match="caches can go back"):
        fast.generate(prompt(1), prompt_lookup_num_tokens=2, **GREEDY)


def test_windows_are_what_they_are_in_the_models_own_cache():
    """Hidden by position, also where the prompt does not fit the window and rows are padded."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, eos_token_id=None, pad_token_id=0)  # fmt: skip
    model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=16)).eval()
    model.set_attn_implementation("thresher_kv")
    policy = KVPolicy(bits=None, important=1.0, drop=True)
    for inputs in (padded(), dict(input_ids=prompt(1))):
        actual = model.generate(**inputs, past_key_values=MixedPrecisionCache(model.config, policy), **GREEDY)
        assert torch.equal(actual, model.generate(**inputs, **GREEDY))


def test_whose_attention_others_may_do_is_read_where_it_is_not_said(model, monkeypatch):
    """As of Qwen3-Next and Qwen3.5, whose classes do not say so."""
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    from thresher.generation.request import _lets_others_attend

    class Own(torch.nn.Module):
        _supports_attention_backend = False

    monkeypatch.setattr(LlamaPreTrainedModel, "_supports_attention_backend", False)
    assert _lets_others_attend(model) and not _lets_others_attend(Own())
