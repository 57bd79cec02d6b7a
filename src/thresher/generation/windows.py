"""Caches of layers that see a window, kept whole while that costs little, so that their programs are everyone's.

transformers gives such a layer a cache as long as its window, with a count of tokens that is a Python number: Dynamo makes
programs for windows that are not full yet, that become full, and that are full, for prompts and steps and each kind of
cache. A layer that keeps all has one program, its mask hides what is older, and attention reads only what the mask shows.
"""

from __future__ import annotations

from typing import Any

LEAST = 2048  # tokens a row that are kept whole whatever the window
WINDOWS = 2  # or as many windows: so much more memory than the window's own
_KINDS = {"full_attention", "sliding_attention"}  # others do not tell by a mask alone what a layer sees


def keep_whole(cache: Any, model: Any, tokens: int) -> bool:
    """Have an empty cache of transformers' own keep all tokens in layers with a window; False where it is left as it is.

    model: a decoder, whose `generate` made the cache. tokens: that a row may come to have, prompt included.
    """
    from transformers import cache_utils as kinds

    sliding = getattr(kinds, "DynamicSlidingWindowLayer", None)
    static = getattr(kinds, "StaticSlidingWindowLayer", None)
    if type(cache) not in (kinds.DynamicCache, kinds.StaticCache):
        return False
    if any(layer.is_initialized for layer in cache.layers):  # first, since every step asks
        return False
    windows = [layer for layer in cache.layers if type(layer) in (sliding, static)]
    config = model.config.get_text_config(decoder=True)
    if not windows or not _by_mask_alone(config):
        return False
    if type(cache) is kinds.StaticCache:
        known = [layer.max_cache_len for layer in cache.layers if type(layer) is kinds.StaticLayer]
        # all layers must be as long: one mask serves them
        tokens = known[0] if known else getattr(model, "_previous_max_cache_length", tokens)
    if tokens > max(LEAST, WINDOWS * (getattr(config, "sliding_window", None) or 0)):
        return False
    for index, layer in enumerate(cache.layers):
        if type(layer) is static:
            cache.layers[index] = kinds.StaticLayer(max_cache_len=tokens)
    whole(cache)
    return True


def whole(cache: Any) -> Any:
    """An empty dynamic cache, whose layers with a window keep all tokens from now on."""
    from transformers import cache_utils as kinds

    sliding = getattr(kinds, "DynamicSlidingWindowLayer", None)
    cache.layers = [kinds.DynamicLayer() if type(layer) is sliding else layer for layer in cache.layers]
    return cache


def _by_mask_alone(config: Any) -> bool:
    """Whether all layers attend, and their masks say what they see."""
    if getattr(config, "attention_chunk_size", None) is not None:
        return False
    return set(getattr(config, "layer_types", None) or ()) <= _KINDS
