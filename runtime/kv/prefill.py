"""Generation behind a compiled, pruned prefill.

    prefill = thresher.compile(model, inputs, transprune={...})
    cache = MixedPrecisionCache(model.config, KVPolicy(bits=None, important=1.0, drop=True))
    text = generate(model, prefill, inputs, cache, max_new_tokens=100)

The prefill's layers keep different numbers of tokens; the cache holds each at its own length, with the
tokens' positions in the whole prompt. The next token's position is the prompt's length, whatever was left
out: renumbered positions too end where the prompt does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from thresher import given_tokens
from thresher.errors import ArgumentError

from .cache import ATTENTION, MixedPrecisionCache

IMAGES = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes")


def prefill(
    compiled: Callable[..., Any], inputs: Mapping[str, Any], cache: MixedPrecisionCache, hold_back: int = 0
) -> Any:
    """Run a prompt through a compiled model and give its keys and values to an empty cache.

    hold_back: so many of the prompt's last tokens are left to be fed again, which generation needs one of.
    Returns the model's output.
    """
    output = compiled(**inputs, use_cache=True)
    past = getattr(output, "cache", None) or output.past_key_values
    first = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if first is None:
        raise ArgumentError("inputs", sorted(inputs), "input_ids or inputs_embeds", "Pass the prompt.")
    length = first.shape[1]
    for index, layer in enumerate(past.layers):
        keys, values = layer.keys, layer.values
        known = given_tokens.about(keys)
        positions = known.get("kept")
        if positions is None:
            if keys.shape[2] != length:
                raise ArgumentError(
                    "compiled",
                    f"layer {index} with {keys.shape[2]} of {length} tokens, and nothing that says which",
                    "a model compiled by Thresher, called here for the first time with these inputs",
                    "Pass what thresher.compile or torch.compile(backend='thresher') returned.",
                )
            positions = torch.arange(length, device=keys.device).expand(keys.shape[0], -1)
        scores = known.get("scores")
        if hold_back:
            keys, values, positions, scores = _without_last(
                keys, values, positions, scores, length - hold_back
            )
        cache.fill(index, keys, values, positions, length - hold_back, scores)
    return output


def _without_last(
    keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scores: torch.Tensor | None, end: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Forget tokens from position `end` on: cut off where they stand last in every row, else as gaps."""
    late = positions >= end
    count = int(late[0].sum())
    if count and bool((late.sum(1) == count).all()) and bool(late[:, -count:].all()):
        keys, values, positions = keys[:, :, :-count], values[:, :, :-count], positions[:, :-count]
        return keys, values, positions, None if scores is None else scores[:, :-count]
    return keys, values, positions.masked_fill(late, -1), scores


def generate(
    model: Any,
    compiled: Callable[..., Any],
    inputs: Mapping[str, Any],
    cache: MixedPrecisionCache,
    **options: Any,
) -> torch.Tensor:
    """`model.generate` with its prefill replaced by a compiled one; ids [B, prompt + new].

    The prompt's last token is fed a second time, so that sampling and logit processors see what they always
    see. options: of `model.generate`.
    """
    if "input_ids" not in inputs:
        raise ArgumentError("inputs", sorted(inputs), "input_ids", "Generation continues token ids.")
    before = model.config.get_text_config(decoder=True)._attn_implementation
    rest = {k: v for k, v in inputs.items() if k not in IMAGES}
    try:
        if before == ATTENTION:  # its keys are the cache's own; a prefill must return them
            model.set_attn_implementation("sdpa")
        with torch.no_grad():
            prefill(compiled, inputs, cache, hold_back=1)
            model.set_attn_implementation(ATTENTION)
            return model.generate(**rest, past_key_values=cache, **options)
    finally:
        model.set_attn_implementation(before)
