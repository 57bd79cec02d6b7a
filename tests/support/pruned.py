"""A model's program with TransPrune in it, run as it stands: what it gives, and which tokens it kept."""

from __future__ import annotations

from typing import Any

import captures
import torch
import zoo

from thresher.backend import run_pipeline
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime.call_session import built, run_built


def pruned(
    model: torch.nn.Module, inputs: zoo.Inputs, options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Its first result, and what the program tells beside its results, by name (`kept.1`, ...).

    The model is captured once for all options (see `captures.once`), and the rewrite is not verified.
    """
    program = captures.once(model, inputs)
    given = captures.arguments(program, inputs)
    after, report = run_pipeline(program, Recipe.of(None, verify=False, transprune=options), given)
    assert report["transprune"].rewritten, report
    (result, *_), extras = run_built(built(after, Reference(), report), given)
    return result, extras


def by_hand(model, ids, cuts):
    """The same layers called one by one. cuts: layer -> kept tokens [B, L] of the whole prompt."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    at = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    rotary = inner.rotary_emb(hidden, at)
    rows = torch.arange(ids.shape[0])[:, None]
    for number, layer in enumerate(inner.layers):
        if number in cuts:
            index = torch.searchsorted(at.contiguous(), cuts[number])
            hidden, at = hidden[rows, index], cuts[number]
            rotary = inner.rotary_emb(hidden, at)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return model.lm_head(inner.norm(hidden)), at
