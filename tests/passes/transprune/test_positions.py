"""Renumbered positions: the published numbering, layer group by layer group, and its decoding."""

import leniently
import pytest
import torch
import zoo
from tiny_llama import IMAGE, make, prompt
from transformers import DynamicCache

import thresher
from thresher.generation.prefill import prefill
from thresher.runtime.kv.cache import MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy

OPTIONS = dict(
    image_token_id=IMAGE,
    min_image_tokens=2,
    bucket=1,
    min_saving=-1.0,
    policy="uniform",
    position="renumbered",
)


def compiled(model, inputs, compile=thresher.compile, **options):
    torch._dynamo.reset()
    return compile(model, inputs, target="reference", transprune={**OPTIONS, **options})


@torch.no_grad()
def test_it_is_the_published_numbering_and_decoding_goes_on_with_it():
    """By hand: behind each cut tokens count 0, 1, ..., and each layer counts on from its own number of tokens."""
    model, ids = make(), prompt()
    call = compiled(model, dict(input_ids=ids, use_cache=True), stages=((1, 0.5), (2, 0.25)))
    cache = MixedPrecisionCache(model.config, KVPolicy(bits=None, important=1.0, drop=True))
    logits = prefill(call, dict(input_ids=ids), cache).logits
    kept = call.sessions[-1].extras
    inner, past, hidden = model.model, DynamicCache(), model.model.embed_tokens(ids)
    at = torch.arange(48).expand(2, -1)
    for number, layer in enumerate(inner.layers):
        if number:
            index = torch.searchsorted(at.contiguous(), kept[f"kept.{number}"])
            hidden, at = hidden[torch.arange(2)[:, None], index], kept[f"kept.{number}"]
        rotary = inner.rotary_emb(hidden, torch.arange(at.shape[1])[None])
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, past_key_values=past)
    expected = model.lm_head(inner.norm(hidden))
    torch.testing.assert_close(logits[torch.arange(2)[:, None], at], expected, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("thresher_kv")
    for count in (1, 1, 5):  # two new tokens one by one, then a second turn
        more = prompt(seed=count, span=None)[:, :count]
        hidden = inner.embed_tokens(more)
        for index, layer in enumerate(inner.layers):
            held = past.get_seq_length(index)
            rotary = inner.rotary_emb(hidden, torch.arange(held, held + count)[None])
            mask = torch.ones(count, held + count, dtype=torch.bool).tril(held)[None, None]
            model.set_attn_implementation("sdpa")
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=past)
        expected = model.lm_head(inner.norm(hidden))
        model.set_attn_implementation("thresher_kv")
        torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_tokens_keep_their_positions_where_none_goes():
    model, ids = make(), prompt()
    call = compiled(model, dict(input_ids=ids, use_cache=False), stages=((1, 1.0),), always=True)
    assert call.report["transprune"].error == 0.0


class ThreeAxes(torch.nn.Module):
    """A decoder whose caller gives positions on three axes, as those of images are."""

    def __init__(self):
        super().__init__()
        self.inner = make(num_hidden_layers=2)

    def forward(self, input_ids, position_ids):
        return self.inner(input_ids, position_ids=position_ids[0], use_cache=False)


@pytest.mark.parametrize(
    "policy, said",
    [pytest.param("iga", True, marks=pytest.mark.thorough), ("fastv", True), ("uniform", False)],
)
def test_a_window_that_may_not_reach_the_image_is_said_where_attention_is_scored(policy, said):
    model, inputs = zoo.ZOO["mistral"].build()
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    options = dict(image_token_id=None, image_span=(0, 6), stages=((1, 0.5),), policy=policy, position="kept")
    report = compiled(model, inputs, **options).report["transprune"]
    assert report.rewritten
    assert any("which may not reach the image" in note for note in report.notes) == said


@pytest.mark.filterwarnings("ignore::thresher.ThresherWarning")
@pytest.mark.parametrize(
    "name, reason", [("gpt2", "in its embeddings"), ("mistral", "a window"), ("axes", "several axes")]
)
@torch.no_grad()
def test_positions_that_cannot_be_renumbered_are_named(name, reason):
    if name == "axes":
        model, ids = ThreeAxes().eval(), prompt()
        inputs = dict(input_ids=ids, position_ids=torch.arange(48).expand(3, 2, -1).contiguous())
    else:
        model, inputs = zoo.ZOO[name].build()
        inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    span = dict(image_token_id=None, image_span=(0, 6), stages=((1, 0.5),))
    call = compiled(model, inputs, leniently.compile, **span)
    missed = [m.reason for m in call.report["transprune"].missed]
    assert any(reason in m and "position='kept'" in m for m in missed), missed
