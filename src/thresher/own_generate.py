"""Whether transformers' own `generate` calls a compiled model, and what it would do with a pruned cache.

After `model.compile(backend="thresher")` nothing of ours stands between `generate` and the model: the cache is one of
transformers, which takes all layers to hold the same tokens, and masks are made for the first of them. So behind a cut it is
right only where a step needs no mask.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from .errors import ArgumentError

_FILE = os.path.join("transformers", "generation", "utils.py")
NOT_ROUNDED = (
    "zipvl's kv='quantize' rounds nothing in generate of a model with .compile(backend='thresher'): keys and values stay "
    "whole in a cache of transformers. Generate with thresher.compile(model, batch, recipe).generate(...), whose cache "
    "holds them at 4 and 2 bits; or say kv='keep'."
)
_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit")


def running() -> dict[str, Any] | None:
    """What transformers' `generate` on this thread's stack works with, by its own names; None outside one."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_code.co_filename.endswith(_FILE):
            return dict(frame.f_locals)
        frame = frame.f_back
    return None


def refuse(uneven: bool) -> bool:
    """Raise ArgumentError where transformers' own `generate` would misread the pruned cache that a prompt leaves.

    uneven: rows kept different numbers of tokens. False outside a `generate`, where nothing is known of the caller.
    """
    call = running()
    if call is None:
        return False
    mask = (call.get("model_kwargs") or {}).get("attention_mask")
    config = call.get("generation_config")
    draft = "assistant_model" if call.get("assistant_model") is not None else None
    draft = next((name for name in _DRAFTS if getattr(config, name, None)), draft)
    if uneven or (isinstance(mask, torch.Tensor) and bool((mask == 0).any())):
        argument, given = (
            "attention_mask",
            "a batch with padding, or whose rows keep different numbers of tokens",
        )
    elif draft is not None:
        argument, given = draft, "a draft, which is checked several tokens at once"
    else:
        return True
    raise ArgumentError(
        argument,
        f"{given}, in generate of a model with .compile(backend='thresher') and a recipe that shortens its cache",
        "rows without padding that keep as many tokens each, one token a step: transformers' masks fit no other cache whose "
        "layers hold different tokens",
        "Generate with thresher.compile(model, batch, recipe).generate(...), which is given the same arguments.",
    )
