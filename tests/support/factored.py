"""A transformers attention that is sdpa with its scale folded into queries and keys, as OPT's and MusicGen's are."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "scale_in_queries_and_keys"


def _attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **other: Any) -> Any:
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return sdpa_attention_forward(module, q * (scale * 64), k * 0.25, v, mask, scaling=1 / 16, **other)


def factored(model: Any) -> Any:
    """A copy of a model that computes the same by factors on its queries and keys."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    made = copy.deepcopy(model)
    made.config._attn_implementation = NAME
    return made
