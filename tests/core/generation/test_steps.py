"""Steps that are bound to a generation give the model's own tokens, and see what is changed between two of them."""

import gc

import pytest
import torch
import transformers
from tiny_llama import make
from transformers import StoppingCriteriaList

import thresher
from thresher.compat import unchanged_state
from thresher.generation import steps
from thresher.generation.settled import Settled
from thresher.kernels import native

pytestmark = pytest.mark.skipif(native.load_error("step") is not None, reason="no C++ compiler")
GREEDY = dict(max_new_tokens=8, do_sample=False)
SEEN = dict(return_dict_in_generate=True, output_logits=True, output_scores=True)


def padded(rows=3, tokens=11):
    ids = torch.randint(1, 90, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[rows // 2, :5] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.thorough), 7])
def both(request):
    model = make(num_hidden_layers=request.param)
    return model, thresher.compile(model, padded(), "exact")


@pytest.fixture
def counted(monkeypatch):
    """Steps that went by no Dynamo, of all generations of a test."""
    made = []
    init = steps.Steps.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(steps.Steps, "__init__", noted)
    return lambda: sum(one.bound for one in made)


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "layers"):
        return [t for layer in result.layers for t in (layer.keys, layer.values)]
    if isinstance(result, (tuple, list)):
        return [t for one in result for t in tensors(one)]
    return [t for one in result.values() for t in tensors(one)] if hasattr(result, "values") else []


def same(model, fast, make=dict, **given):
    found = []
    for one in (model, fast):
        torch.manual_seed(3)
        found.append(tensors(one.generate(**{**padded(), **GREEDY, **given, **make()})))
    assert len(found[0]) == len(found[1])
    for expected, actual in zip(*found):
        assert actual.is_contiguous() == expected.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


MODES = {
    "greedy": ({}, 6),
    "scores and the cache": (SEEN, 6),
    "samples": (dict(do_sample=True, num_return_sequences=2, temperature=0.8, top_k=20, top_p=0.9), 6),
    "processors": (dict(repetition_penalty=1.3, min_new_tokens=3, eos_token_id=[5, 9, 17]), 2),
    "beams": (dict(num_beams=3, num_return_sequences=2, **SEEN), 6),
    "static": (dict(cache_implementation="static"), 6),
    "one row without a mask": (dict(input_ids=padded()["input_ids"][:1], attention_mask=None), 6),
    "a long one": (dict(max_new_tokens=150), 100),
    "drafts": (dict(input_ids=padded()["input_ids"][:1], attention_mask=None, prompt_lookup_num_tokens=2), 0),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=pytest.mark.thorough) if m == "drafts" else m for m in MODES]
)
def test_bound_steps_give_what_transformers_gives(both, counted, mode):
    given, least = MODES[mode]
    same(*both, **given)
    assert counted() >= least


def test_a_second_turn_goes_on_from_the_cache(both, counted):
    found = []
    for one in both:
        first = one.generate(**padded(), **GREEDY, **SEEN)
        name = "cache" if "cache" in first else "past_key_values"
        more = torch.cat([first.sequences, torch.full((3, 2), 7)], 1)
        mask = torch.cat([padded()["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
        given = {"input_ids": more, "attention_mask": mask, name: first[name], "max_new_tokens": 90}
        found.append(tensors(one.generate(**given, do_sample=False, **SEEN)))
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert counted() > 80


def _at_third(change):
    """Options that change a model once the third token is made."""
    count = [0]

    def criterion(ids, scores, **_):
        count[0] += 1
        if count[0] == 3:
            change()
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    return lambda: {"stopping_criteria": StoppingCriteriaList([criterion])}


def _edits(model):
    """What somebody may do to a model between two steps, and how it is undone."""
    layer, head = model.model.layers[-1], model.lm_head
    weight, other = head.weight, layer.mlp.up_proj.weight
    kept = other.detach().clone()
    yield "in place", lambda: other.data.mul_(-2.0), lambda: other.data.copy_(kept)
    yield "data", lambda: setattr(other, "data", kept * -2), lambda: setattr(other, "data", kept.clone())
    turned = torch.nn.Parameter(-weight.detach())
    yield "another weight", lambda: setattr(head, "weight", turned), lambda: setattr(head, "weight", weight)
    mlp = layer.mlp
    yield (
        "another module",
        lambda: setattr(layer, "mlp", torch.nn.Identity()),
        lambda: setattr(layer, "mlp", mlp),
    )
    if (
        len(model.model.layers) > 6
    ):  # of fewer Dynamo says the same at the next step; hooks it never looks for
        hooks = []
        yield (
            "a hook",
            lambda: hooks.append(mlp.register_forward_hook(lambda m, a, out: out * -3)),
            lambda: hooks.pop().remove(),
        )


def test_what_is_changed_between_two_steps_is_seen(both, counted):
    model, fast = both
    plain = model.generate(**padded(), **GREEDY, **SEEN).logits
    for name, change, undo in _edits(model):
        logits = []
        for one in (model, fast):
            logits.append(
                torch.stack(one.generate(**padded(), **GREEDY, **SEEN, **_at_third(change)()).logits)
            )
            undo()
        assert (logits[0] - torch.stack(plain)).abs().max() > 1e-2, name
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3, msg=name)
    assert counted()


def test_a_hook_on_the_compiled_model_runs_at_each_step(both, counted):
    _, fast = both
    calls = []
    hook = fast.register_forward_hook(lambda *_: calls.append(1))
    fast.generate(**padded(), **GREEDY)
    hook.remove()
    assert len(calls) == 8 and not counted()


def test_a_window_that_is_passed_is_another_program(counted):
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                 num_hidden_layers=2, sliding_window=16, pad_token_id=0, bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    fast = thresher.compile(model, padded(), "exact")
    same(model, fast, max_new_tokens=20)
    assert counted() > 15


def test_low_bit_weights_that_are_written_are_packed_anew(counted):
    model = make(num_hidden_layers=2, hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    nvfp4 = {"min_weights": 0, "budget": 8.0}
    fast = thresher.compile(model, padded(), prepack=True, decode_attention=True, nvfp4=nvfp4, verify=False)
    weight = model.model.layers[0].mlp.up_proj.weight

    def change():
        with torch.no_grad():
            weight.mul_(-4.0)

    fast.generate(**padded(), **GREEDY)
    before = sum(c.repacked for c in fast.counters)
    fast.generate(**padded(), **GREEDY, **_at_third(change)())
    assert not counted() and sum(c.repacked for c in fast.counters) > before


def test_a_quantized_model_is_followed_by_layers_and_its_steps_are_bound(counted):
    """Its modules have hooks, but of loading."""
    model = make(num_hidden_layers=7, hidden_size=64, intermediate_size=96)
    made = thresher.quantize(
        model, [padded()], thresher.RSQ(bits=4, head_bits=8, method="nearest", rotate_down=False)
    )
    quantized = made.as_model()
    fast = thresher.compile(quantized, padded(), "exact")
    same(quantized, fast)
    assert counted() == 6 and fast._call.short is not None


def test_settled_sees_attributes_modules_and_lists():
    model = make(num_hidden_layers=2)
    model.names = ["a"]
    settled = Settled(model)
    assert settled.plain and settled.unchanged()
    for change, undo in (
        (lambda: model.names.append("b"), model.names.pop),
        (lambda: setattr(model.model.layers[1].self_attn, "scaling", 3.0), lambda: None),
    ):
        change()
        assert not settled.unchanged()
        undo()
    settled = Settled(model)
    model.config.hidden_act = "relu"
    assert not settled.unchanged()


def test_the_state_that_dynamo_compiles_for_is_told():
    same_state = unchanged_state()
    assert same_state()
    with torch.inference_mode(False), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not same_state()


def test_settled_sees_weights_that_are_moved_or_viewed_otherwise():
    model = make(num_hidden_layers=2)
    weight = model.model.layers[0].self_attn.q_proj.weight
    for change, undo in (
        (lambda: setattr(weight, "data", weight.data.clone()), lambda: None),
        (lambda: setattr(weight, "data", weight.data.t()), lambda: setattr(weight, "data", weight.data.t())),
        (lambda: setattr(weight, "data", weight.data[:1]), lambda: None),
    ):
        settled = Settled(model)
        assert settled.plain and settled.unchanged()
        change()
        assert not settled.unchanged()
        undo()
    with torch.no_grad():
        settled = Settled(model)
        weight.add_(1)  # in place: steps read it as it is now
        assert settled.unchanged()


def test_settled_keeps_no_weight_alive_once_it_is_gone():
    model = make(num_hidden_layers=2)
    storage = model.lm_head.weight.untyped_storage()
    settled = Settled(model)
    del model
    gc.collect()
    assert torch._C._storage_Use_Count(storage._cdata) == 2
    del settled
    gc.collect()
    assert torch._C._storage_Use_Count(storage._cdata) == 1
