"""The first call of assisted decoding, in two: transformers puts drafts behind the prompt and runs both at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .programs import cache_of

_PLAIN = (bool, int, float, str, type(None))


def split(named: Mapping[str, Any], total: int, drafts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's arguments as those of the prompt alone, and of the drafts over the cache that it leaves.

    total: tokens a row. What has one number a token (ids, mask, positions, types) is cut; the drafts' mask stays whole, as a
    step's is, and images and what was made of them are the prompt's alone.
    """
    along = {
        k: v
        for k, v in named.items()
        if isinstance(v, torch.Tensor) and not v.is_floating_point() and v.shape[-1:] == (total,)
    }
    own = total - drafts
    prompt = {**named, **{k: v[..., :own] for k, v in along.items()}}
    if "logits_to_keep" in prompt:
        prompt["logits_to_keep"] = 1
    cache = cache_of(named)
    behind = {k: v for k, v in named.items() if v is cache or isinstance(v, _PLAIN)}
    behind.update({k: v if k == "attention_mask" else v[..., own:] for k, v in along.items()})
    return prompt, behind
