"""Tokens that are kept whatever the question: which, by the formulas, of a small random decoder."""

import pytest
import torch
from pruned import pruned
from tiny_llama import IMAGE, SPAN, make, prompt
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

KEEP = 8  # of 32 image tokens


@pytest.fixture(scope="module")
def model():
    return make()


def next_layer(model, ids):
    """Queries and keys [B, 4, n, 8] of layer two, rotated, key heads repeated for their queries."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    hidden = inner.layers[0](hidden, attention_mask=None, position_embeddings=rotary)
    layer = inner.layers[1]
    x = layer.input_layernorm(hidden)
    q, k = (
        p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    return q, k.repeat_interleave(2, dim=1)


@pytest.mark.parametrize(("by", "asked"), [("keys", 32), ("attention", 32), ("attention", 5)])
@torch.no_grad()
def test_what_is_reserved(model, by, asked):
    ids = prompt()
    options = dict(
        image_token_id=IMAGE, min_image_tokens=8, bucket=1, min_saving=0.0, policy="uniform", restore="none"
    )
    chosen = dict(reserve=1.0, reserve_by=by, instruction=asked, stages=((1, KEEP / 32),))
    _, extras = pruned(model, dict(input_ids=ids), {**options, **chosen})
    q, k = next_layer(model, ids)
    if by == "keys":
        score = k.norm(dim=-1).mean(1)
    else:
        rows = SPAN.start + torch.tensor([i for i in range(32) if (i + 1) * asked // 32 > i * asked // 32])
        seen = torch.arange(ids.shape[1]) <= rows[:, None]
        paid = (q[:, :, rows] @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        score = paid.mean(1).sum(1) / seen.sum(0).clamp_min(1)
    best = score[:, SPAN].topk(KEEP).indices + SPAN.start
    for row, kept in enumerate(extras["kept.1"]):
        image = [t for t in kept.tolist() if SPAN.start <= t < SPAN.stop]
        assert image == sorted(best[row].tolist())
