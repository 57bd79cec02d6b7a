"""ZipVL on a Llama called layer by layer, with the map of the probe rows written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny_llama import make
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from thresher.kernels.tokens.attention import important_attention

RECENT, SPREAD, SINKS, BUCKET = 6, 6, 2, 4
OPTIONS = dict(recent=RECENT, spread=SPREAD, bucket=BUCKET, sinks=SINKS, min_saving=-9.0)


def make_model(layers: int):
    """A random Llama whose tokens differ in importance, and whose projections give something for tokens left out."""
    model = make(num_hidden_layers=layers, initializer_range=0.2, attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)
    return model


def count(tokens: int, keep: float, protected: int = RECENT + SINKS) -> int:
    """Tokens that attend: the protected ones and a share of the others, in 1/4096, in whole buckets."""
    beside = -(-(tokens - protected) * round(keep * 4096) // 4096)
    return min(tokens, -(-(protected + beside) // BUCKET) * BUCKET)


def tokens_attend(layer, hidden, rotary, number, protected=None):
    """One layer's attention among its `number` important tokens: their importance [B, n], and the hidden state after it.

    number: an int; or the share of the attention that they must hold, for one row. protected: bool [B, n] or None,
    for the first and last tokens.
    """
    batch, tokens = hidden.shape[:2]
    at = layer.self_attn
    x = layer.input_layernorm(hidden)
    q, k, v = (
        p(x).view(batch, tokens, -1, at.head_dim).transpose(1, 2) for p in (at.q_proj, at.k_proj, at.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    place = torch.arange(tokens)
    if protected is None:
        protected = ((place < SINKS) | (place >= tokens - RECENT)).expand(batch, -1)
    starts = torch.zeros(batch, 1).long()
    rows = torch.ops.thresher.probe_positions(starts, starts + tokens, RECENT, SPREAD, 0)[0]
    rows = rows[rows >= 0]
    scores = q[:, :, rows] @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * at.scaling
    seen = place <= rows[:, None]
    sums = scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(2).mean(1)
    importance = sums / seen.sum(0).clamp_min(1)
    rank = importance.masked_fill(protected, torch.inf)
    if isinstance(number, float):
        held = sums.double().gather(1, rank.argsort(1, descending=True)).cumsum(1)
        number = max(int((held < number * held[:, -1:]).sum()) + 1, int(protected.sum()))
    index = rank.topk(number).indices.sort().values
    out = important_attention.reference(q, k, v, index, at.scaling)
    hidden = hidden + at.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
    return importance, hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def run(model, ids: torch.Tensor, number: int | float) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Logits, and each layer's importance."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    found = []
    for layer in inner.layers:
        importance, hidden = tokens_attend(layer, hidden, rotary, number)
        found.append(importance)
    return model.lm_head(inner.norm(hidden)), found
