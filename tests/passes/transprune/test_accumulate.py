"""`accumulate_from`: from which layer on transitions count for the scores."""

import pytest
import torch
from tiny_llama import IMAGE, TOKENS, make, prompt

import thresher
from thresher.errors import ArgumentError

OPTIONS = dict(
    image_token_id=IMAGE, min_image_tokens=8, bucket=1, min_saving=0.0, policy="ttv", stages=((2, 0.25),)
)


@pytest.fixture(scope="module")
def model():
    return make()


def kept(model, ids, **options):
    """int64 [batch, kept]: the tokens that are left behind layer 2."""
    torch._dynamo.reset()
    inputs = dict(input_ids=ids, use_cache=False)
    call = thresher.compile(model, inputs, target="reference", transprune={**OPTIONS, **options})
    call(**inputs)
    return call.sessions[-1].extras["kept.2"]


def transitions(model, ids):
    """fp32 [batch, tokens] for each layer: how much attention and MLP turn and stretch the hidden state (equation 3)."""
    inner, image, found = model.model, ids == IMAGE, []
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer in inner.layers[:2]:
        x = layer.input_layernorm(hidden)
        moved = layer.self_attn(x, position_embeddings=rotary, attention_mask=None)[0]
        middle = hidden + moved
        fed = layer.mlp(layer.post_attention_layernorm(middle))
        score = 0
        for a, f in ((hidden, moved), (middle, fed)):
            turn = 1 - torch.cosine_similarity(a, f, dim=-1).abs()
            score = score + turn.masked_fill(~image, -torch.inf).softmax(-1) * f.norm(dim=-1) / a.norm(dim=-1)
        found.append(score)
        hidden = middle + fed
    return found


@torch.no_grad()
def test_transitions_count_from_the_layer_that_is_named(model):
    ids = prompt()
    first, second = transitions(model, ids)

    def best(score):
        return score.masked_fill(ids != IMAGE, torch.inf).topk(TOKENS - 24).indices.sort().values

    both, last = kept(model, ids, accumulate_from=1), kept(model, ids)
    assert torch.equal(both, best(first + second)) and torch.equal(last, best(second))
    assert not torch.equal(both, last), "the option changes something here"
    assert torch.equal(kept(model, ids, accumulate_from=2), last)


def test_a_layer_behind_the_first_stage_is_a_miss(model):
    ids = prompt()
    found = thresher.explain(
        model, dict(input_ids=ids, use_cache=False), transprune={**OPTIONS, "accumulate_from": 3}
    )
    (missed,) = found.report["transprune"].missed
    assert "accumulate_from=3 is behind the first stage, which is after layer 2" in missed.reason


@pytest.mark.parametrize("given", [0, -1])
def test_layers_count_from_one(given):
    with pytest.raises(ArgumentError, match=r"accumulate_from: got .* at least 1"):
        thresher.Recipe.of(transprune={"accumulate_from": given})
