"""What a compiled prompt leaves behind, and how it moves into a cache to generate with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from thresher import given_tokens
from thresher.errors import ArgumentError

from .programs import cache_of


def prompt_cache(config: Any, cache: Any) -> Any:
    """An empty cache for a compiled prompt to hand back, whose layers are those of `cache`, a MixedPrecisionCache.

    Windowed layers hand all of their tokens back too, where no layer holds something else.
    """
    from transformers.cache_utils import DynamicCache

    return DynamicCache() if len(cache.own) == len(cache.layers) else DynamicCache(config=config)


def prefill(compiled: Callable[..., Any], inputs: Mapping[str, Any], cache: Any) -> Any:
    """Run a prompt through a compiled model and give what it leaves to an empty MixedPrecisionCache; the model's output.

    For a loop of your own: `fast.generate` does this by itself. Positions, where none are given, come from the mask.
    """
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if tokens is None:
        raise ArgumentError("inputs", sorted(inputs), "input_ids or inputs_embeds", "Pass the prompt.")
    given = dict(inputs)
    mask = given.get("attention_mask")
    if mask is not None and given.get("position_ids") is None and bool((mask == 0).any()):
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    with given_tokens.reading_kept():
        output = compiled(**given, use_cache=True)
    move(cache_of(dict(output)), cache, tokens.shape[1])
    return output


def move(past: Any, cache: Any, length: int) -> None:
    """Give what a prompt of `length` tokens left in `past` to an empty MixedPrecisionCache.

    Raises ArgumentError for layers that hold fewer tokens than they should and nothing that says which.
    """
    own = cache.own
    for index, layer in enumerate(past.layers):
        if cache.layers[index] not in own:
            cache.layers[index] = layer  # a recurrent state, cross-attention: as transformers holds it
            continue
        keys, values = layer.keys, layer.values
        known = given_tokens.about(keys)
        positions = known.get("kept")
        if positions is None:
            held, window = keys.shape[2], getattr(layer, "sliding_window", None)
            if held != length and (window is None or held != min(length, window - 1)):
                raise ArgumentError(
                    "compiled",
                    f"layer {index} with {held} of {length} tokens, and nothing that says which",
                    "a model compiled by Thresher, called here for the first time with these inputs",
                    "Pass what thresher.compile or torch.compile(backend='thresher') returned.",
                )
            positions = torch.arange(length - held, length, device=keys.device).expand(keys.shape[0], -1)
        cache.fill(index, keys, values, positions, length, known.get("scores"))
