"""A Hugging Face cache that keeps important tokens at 4 bits and the others at 2, or forgets them.

    out = fast.generate(**inputs, return_dict_in_generate=True)     # `fast` of thresher.compile: the cache is made by itself
    model.set_attn_implementation("thresher_kv")                    # without compiling, by hand
    model.generate(input_ids, cache=MixedPrecisionCache(model.config))

The model is not changed. `thresher_kv` attends over the codes directly and tells the cache which
tokens were attended to. With any other attention implementation the cache still works, but hands
out restored keys and values, and, as it never meets a query, counts every token as important.

Importance follows ZipVL (arXiv 2410.08584): attention from recent and spread probe rows, keys
rounded per channel, values per token; every `block` new tokens are judged by the newest query.
Beside the codes, each layer may hold another number of tokens; positions always count all tokens, and the model's own mask,
made over all of them, is read at the positions that a layer holds. So windows and padding mean what they meant.
"""

from __future__ import annotations

from typing import Any

import torch

from thresher.errors import ArgumentError, MissingDependencyError

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import (
        DYNAMIC_LAYER_TYPE_MAPPING,
        Cache,
        DynamicLayer,
        get_layer_types_and_kwargs,
    )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise MissingDependencyError("transformers", "demo", "The key-value cache") from error

from .layer import KVLayer
from .policy import KVPolicy

ATTENTION = "thresher_kv"


# Layers whose past is their keys and values, and those that hold something of fixed size instead.
_ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
_OTHER_KINDS = ("linear_attention", "conv", "dummy")


class MixedPrecisionCache(Cache):
    """Past keys and values, important tokens at more bits than the others.

    config: the model's configuration. Layers that see a window are kept whole, and their mask hides what is older; a
        recurrent layer's state is transformers' own, and so is cross-attention's past. ArgumentError for other kinds.
    policy: what to keep and how; see `KVPolicy`.
    """

    layers: list[Any]

    def __init__(self, config: Any, policy: KVPolicy | None = None):
        self.config = config.get_text_config(decoder=True)
        self.policy = policy or KVPolicy()
        kinds, options = get_layer_types_and_kwargs(self.config)
        cross = getattr(self.config, "cross_attention_layers", None) or ()
        layers: list[Any] = []
        for index, (kind, given) in enumerate(zip(kinds, options, strict=True)):
            if index in cross:
                layers.append(DynamicLayer())
            elif kind in _ATTENTION_KINDS:
                layers.append(KVLayer(self.policy))
            elif kind in _OTHER_KINDS:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**given))
            else:
                raise ArgumentError(
                    "config",
                    f"layer {index} of type {kind!r}, whose past is more than its keys and values",
                    f"layers of types {', '.join(_ATTENTION_KINDS + _OTHER_KINDS)}",
                    "Use transformers.DynamicCache for this model, and no recipe that shortens caches.",
                )
        super().__init__(layers=layers)

    @property
    def own(self) -> list[KVLayer]:
        """The layers that hold keys and values of their own tokens."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held by all layers."""
        return sum(layer.bytes for layer in self.own)

    @property
    def lengths(self) -> list[int]:
        """Slots held by each layer of keys and values."""
        return [layer.slots for layer in self.own]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        if not isinstance(layer, KVLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        fused = self.config._attn_implementation == ATTENTION
        if not fused and self.policy.drop:
            raise ArgumentError(
                "cache",
                "a cache whose layers may hold fewer tokens than were seen",
                f"one of all tokens with attention {self.config._attn_implementation!r}",
                f"Call generate of the compiled model, or model.set_attn_implementation({ATTENTION!r}) first.",
            )
        layer.extend(key_states, value_states)
        if fused:
            keys = layer.keys
            keys.thresher_layer = layer  # type: ignore[attr-defined]  # how attention, which is given no cache, finds the rest
            return keys, layer.values
        keys, values = layer.restore()
        if layer.fresh >= self.policy.block:
            layer.compress(None)
        return keys, values

    def fill(
        self,
        layer_idx: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        seen: int,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Give a layer the outcome of a prefill that ran elsewhere, pruned or not.

        keys, values: [B, Hkv, L, D], keys rotated. positions: int [B, L], rising; -1 for unused slots.
        seen: tokens of the prompt, pruned ones included; alike for all layers.
        scores: [B, L], the most important highest; None counts all as important.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, KVLayer) or layer.seen:
            raise ArgumentError(
                "layer_idx", layer_idx, "a layer of keys and values that is empty", "Call reset() first."
            )
        layer.extend(keys, values, positions, seen)
        if layer.fresh >= self.policy.block or scores is not None:
            layer.compress(scores, None, positions >= 0 if layer.gaps else None)

    def advance(self, count: int, real: torch.Tensor | None = None) -> None:
        """Settle a compiled step of `count` tokens; see `KVLayer.advance`. real: bool [B, seen] or None."""
        for layer in self.own:
            layer.advance(count, real)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; attention_mask is bool [B, 1, queries, seen], or None."""
    layer = getattr(key, "thresher_layer", None)
    if layer is None:  # no cache, or another one
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ArgumentError("dropout", dropout, "0 with this cache", "Call model.eval().")
    for name in ("softcap", "s_aux", "position_bias", "sinks"):
        if kwargs.get(name) is not None:
            raise ArgumentError(
                "cache",
                f"a MixedPrecisionCache beside attention with {name}",
                "softmax(q k^T * scale) and a mask",
                "Use transformers.DynamicCache for this model, and no recipe that shortens caches.",
            )
    if attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.dtype != torch.bool):
        raise ArgumentError(
            "attention_mask",
            f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}",
            "a padding mask [batch, tokens], of which the model makes its own",
            "Pass the tokenizer's mask.",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, scale, attention_mask).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
