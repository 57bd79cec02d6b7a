"""What is set on a layer that a short model has no part of is noticed, as Dynamo would notice it on the whole model."""

import copy

import pytest
import torch
from tiny_llama import make, prompt

import thresher
from thresher.alike.watch import Watch

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2
)


def llama():
    return make(**SIZES)


def batch():
    ids = prompt(3, 12, span=None)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(12)[None] >= torch.tensor([[0], [5], [2]])).long(),
    }


def greedy(model):
    return model.generate(**batch(), max_new_tokens=4, do_sample=False)


def halve(module, given, result):
    return result * 0.5


EDITS = {
    "a number": lambda layer: setattr(layer.self_attn, "scaling", 0.9),
    "a module": lambda layer: setattr(layer, "mlp", copy.deepcopy(layer.mlp).requires_grad_(False)),
    "an activation": lambda layer: setattr(layer.mlp, "act_fn", torch.nn.ReLU()),
    "a hook": lambda layer: layer.mlp.register_forward_hook(halve),
    "a bias": lambda layer: setattr(layer.mlp.up_proj, "bias", torch.nn.Parameter(torch.ones(48))),
    "a new attribute": lambda layer: setattr(layer, "is_special", True),
}


@pytest.fixture(scope="module")
def compiled():
    return thresher.compile(llama(), batch(), "exact", target="reference")


@pytest.mark.parametrize("what", EDITS)
def test_a_change_of_one_layer_is_seen(what):
    layers = llama().model.layers
    watch = Watch(layers)
    assert watch.unchanged(True) and all(watch.unchanged(False) for _ in layers)
    EDITS[what](layers[5])
    assert not watch.unchanged(True)
    assert [watch.unchanged(False) for _ in layers].count(False) == 1


def test_changes_of_values_and_of_training_are_none():
    layers = llama().model.layers
    watch = Watch(layers)
    layers[5].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(48, 32))
    layers[4].train().eval()
    assert watch.unchanged(True)


def test_calls_and_generate_change_nothing_that_is_watched(compiled):
    short = compiled._call.short
    greedy(compiled), compiled(**batch()), greedy(compiled)
    assert short is not None and compiled._call.short is short
    proofs = [p.checked for s in compiled.sessions for p in s.report.passes if p.rewritten]
    assert len(proofs) > 2 and all("three layers" in said for checked in proofs for said in checked)


def test_the_compiled_model_follows_such_a_change(compiled):
    real, model = batch()["attention_mask"].bool(), compiled.model
    before = compiled(**batch()).logits
    model.model.layers[5].self_attn.scaling = 0.9
    with torch.no_grad():
        wanted = model(**batch()).logits
    made = compiled(**batch()).logits
    assert torch.allclose(made[real], wanted[real], atol=1e-5)
    assert not torch.allclose(made[real], before[real], atol=1e-4)
