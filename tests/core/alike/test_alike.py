"""Models whose layers are alike are compiled by three of them: results are the model's, and what differs is noticed."""

import dataclasses

import pytest
import torch
from own_cache import own_cache
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import thresher
from thresher.alike.stack import KEPT, ShortModel, stack_of
from thresher.generation.programs import cache_of

LAYERS = 7
LENGTHS = (5, 9, 14, 8)


def llama(layers=LAYERS):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                         num_key_value_heads=2, num_hidden_layers=layers, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch():
    torch.manual_seed(1)
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long().flip(1)
    return {"input_ids": torch.randint(1, 96, mask.shape) * mask, "attention_mask": mask}


def greedy(model, **more):
    return model.generate(**batch(), max_new_tokens=4, do_sample=False, **more)


@pytest.fixture(scope="module")
def compiled():
    return thresher.compile(llama(), batch(), "exact", target="reference")


def test_calls_give_what_the_model_gives_for_every_layer(compiled):
    out, expected = compiled(**batch()), compiled.model(**batch())
    real = batch()["attention_mask"].bool()
    assert torch.allclose(out.logits[real], expected.logits[real], atol=1e-5)
    pairs = list(zip(cache_of(dict(out)).layers, cache_of(dict(expected)).layers, strict=True))
    assert len(pairs) == LAYERS
    for ours, theirs in pairs:
        for made, wanted in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert torch.allclose(made.transpose(1, 2)[real], wanted.transpose(1, 2)[real], atol=1e-5)


def test_three_layers_are_traced_and_proven_and_all_are_rewritten(compiled):
    [session] = compiled.sessions
    known = {w.fqn.split(".")[2] for w in session.captured.weights.values() if ".layers." in w.fqn}
    assert known == {str(n) for n in range(LAYERS)}
    account = compiled.report["prepack"]
    assert account.rewritten and account.checked and all("three layers" in said for said in account.checked)
    assert account.error <= account.budget and account.unverified is None


def test_a_weight_of_a_further_layer_that_changes_is_used(compiled):
    weight = compiled.model.model.layers[LAYERS - 2].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(1.5)
    real = batch()["attention_mask"].bool()
    assert torch.allclose(compiled(**batch()).logits[real], compiled.model(**batch()).logits[real], atol=1e-5)


def test_a_file_holds_all_layers(compiled, tmp_path):
    path = thresher.save(compiled, tmp_path / "model.thresher", example_inputs=batch())
    made, expected = thresher.load(path, target="reference")(**batch()), compiled(**batch())
    assert torch.allclose(made["logits"], expected.logits, atol=1e-6)
    assert sum("keys" in name for name in made) == LAYERS


def test_phases_have_their_seconds(compiled):
    phases = compiled.sessions[0].report.phases
    assert set(phases) == {"trace", "capture", "passes", "verification", "lowering"}
    assert all(seconds > 0 for seconds in phases.values())
    assert "compiled in trace" in str(compiled.sessions[0].report)


def test_generate_makes_the_models_tokens(compiled):
    expected = greedy(compiled.model)
    assert torch.equal(greedy(compiled), expected)
    first = compiled.generate(**batch(), max_new_tokens=2, num_beams=2, do_sample=False)
    assert torch.equal(
        first, compiled.model.generate(**batch(), max_new_tokens=2, num_beams=2, do_sample=False)
    )
    programs = sum(s.programs for s in compiled.sessions)
    assert torch.equal(greedy(compiled), expected) and compiled.last_call.programs == 0
    assert compiled._call.short is not None and programs == sum(s.programs for s in compiled.sessions)


def test_a_program_of_all_layers_is_taken_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("THRESHER_REWRITE_CACHE", "1")
    monkeypatch.setenv("THRESHER_CACHE_DIR", own_cache(tmp_path))
    real = batch()["attention_mask"].bool()
    for again in (False, True):
        model = llama()
        made = thresher.compile(model, batch(), "exact", target="reference")
        assert any("taken from the cache" in note for note in made.report.notes) is again
        out = made(**batch())
        assert torch.allclose(out.logits[real], model(**batch()).logits[real], atol=1e-5)
        assert len(cache_of(dict(out)).layers) == LAYERS
    torch.nn.init.normal_(model.model.layers[LAYERS - 1].mlp.up_proj.weight)  # another model
    other = thresher.compile(model, batch(), "exact", target="reference")
    assert not any("taken from the cache" in note for note in other.report.notes)


@pytest.mark.slow
def test_a_step_writes_the_static_cache_of_every_layer(compiled):
    assert torch.equal(greedy(compiled, cache_implementation="static"), greedy(compiled.model))
    assert compiled._call.short is not None


def test_a_layer_that_is_replaced_is_used(compiled):
    layers, before = compiled.model.model.layers, compiled._call.short
    layers[LAYERS - 1] = LlamaDecoderLayer(compiled.model.config, LAYERS - 1).eval()
    real = batch()["attention_mask"].bool()
    assert torch.allclose(compiled(**batch()).logits[real], compiled.model(**batch()).logits[real], atol=1e-5)
    assert compiled._call.short is not before


class Doubling(LlamaDecoderLayer):
    """Its number decides, in code that no attribute shows."""

    def forward(self, hidden_states, *args, **kwargs):
        made = super().forward(hidden_states, *args, **kwargs)
        return made * 2 if self.self_attn.layer_idx >= 4 else made


class Numbered(LlamaDecoderLayer):
    """Its number is a constant of its graph."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) * (1 + self.self_attn.layer_idx)


@pytest.mark.parametrize("kind", [Doubling, Numbered])
def test_layers_that_differ_by_their_number_alone_are_found_out(kind):
    model = llama(6)
    for layer in model.model.layers:
        layer.__class__ = kind
    assert stack_of(model) is not None
    compiled = thresher.compile(model, batch(), "exact", target="reference")
    real = batch()["attention_mask"].bool()
    assert torch.allclose(compiled(**batch()).logits[real], model(**batch()).logits[real], atol=1e-4)
    assert compiled._call.short is None


def _unlike(model):
    model.model.layers[4].mlp.act_fn = torch.nn.GELU()


def _tied(model):
    model.model.layers[4].mlp.up_proj.weight = model.model.layers[3].mlp.up_proj.weight


def _hooked(model):
    model.model.layers[5].register_forward_hook(lambda *_: None)


def _scaled(model):
    model.model.layers[5].self_attn.scaling = 0.5


def _few(model):
    model.model.layers = model.model.layers[:3]


@pytest.mark.parametrize("change", [_unlike, _tied, _hooked, _scaled, _few], ids=lambda f: f.__name__)
def test_models_whose_layers_differ_are_compiled_whole(change):
    model = llama()
    assert stack_of(model).layers.count == LAYERS
    change(model)
    assert stack_of(model) is None


def test_a_short_model_follows_the_models_settings():
    model = llama()
    short = ShortModel(model, stack_of(model))
    assert len(short.module.model.layers) == KEPT == short.module.config.num_hidden_layers
    assert short.module.lm_head is model.lm_head and short.follow()
    model.config.output_hidden_states, model.note, model.lm_head = True, "new", torch.nn.Linear(32, 96)
    assert short.follow() and short.module.config.output_hidden_states and short.module.note == "new"
    assert short.module.lm_head is model.lm_head and short.module.config.num_hidden_layers == KEPT
    del model.note
    assert short.follow() and not hasattr(short.module, "note")
    assert len(model.model.layers) == LAYERS == model.config.num_hidden_layers
    model.forward = lambda **_: None
    assert not short.follow()


def test_layers_are_named_and_known_by_name():
    layers = dataclasses.replace(stack_of(llama()).layers)
    assert layers.of("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    assert layers.of("model.layers_of.1.x") is None and list(layers.further) == [3, 4, 5, 6]
    assert layers.named(4, "mlp") == "model.layers.4.mlp"
