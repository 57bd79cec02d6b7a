"""A Hugging Face cache that keeps important tokens at 4 bits and the others at 2, or forgets them.

    model.set_attn_implementation("thresher_kv")
    cache = MixedPrecisionCache(model.config)
    model.generate(input_ids, past_key_values=cache)

The model is not changed. `thresher_kv` attends over the codes directly and tells the cache which
tokens were attended to. With any other attention implementation the cache still works, but hands
out restored keys and values, and, as it never meets a query, counts every token as important.

Importance follows ZipVL (arXiv 2410.08584): attention from recent and spread probe rows, keys
rounded per channel, values per token; every `block` new tokens are judged by the newest query.
Beside the codes, each layer may hold another number of tokens; positions always count all tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from thresher.errors import ArgumentError, MissingDependencyError

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, get_layer_types_and_kwargs
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import flash_attention_mask
except ImportError as error:
    raise MissingDependencyError("transformers", "demo", "The key-value cache") from error

from .layer import KVLayer, KVPolicy

ATTENTION = "thresher_kv"


class MixedPrecisionCache(Cache):
    """Past keys and values, important tokens at more bits than the others.

    config: the model's configuration; every layer must attend to the whole past.
    policy: what to keep and how; see `KVPolicy`.
    """

    layers: list[KVLayer]  # type: ignore[assignment]

    def __init__(self, config: Any, policy: KVPolicy | None = None):
        self.config = config.get_text_config(decoder=True)
        self.policy = policy or KVPolicy()
        kinds, _ = get_layer_types_and_kwargs(self.config)
        for index, kind in enumerate(kinds):
            if kind != "full_attention":
                raise ArgumentError(
                    "config",
                    f"layer {index} of type {kind!r}",
                    "layers that attend to the whole past",
                    "Use transformers.DynamicCache for this model.",
                )
        super().__init__(layers=[KVLayer(self.policy) for _ in kinds])

    @property
    def bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def lengths(self) -> list[int]:
        """Slots held by each layer."""
        return [layer.slots for layer in self.layers]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        fused = self.config._attn_implementation == ATTENTION
        if not fused and self.policy.drop:
            raise ArgumentError(
                "policy",
                "drop=True",
                f"drop=False with attention {self.config._attn_implementation!r}, which wants every token",
                f"Call model.set_attn_implementation({ATTENTION!r}).",
            )
        layer.extend(key_states, value_states)
        if fused:
            keys = layer.tail_keys
            keys.thresher_layer = layer  # type: ignore[attr-defined]  # how attention, which is given no cache, finds the rest
            return keys, layer.tail_values
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
        if layer.seen:
            raise ArgumentError("layer_idx", layer_idx, "a layer that is empty", "Call reset() first.")
        layer.extend(keys, values, positions, seen)
        if layer.fresh >= self.policy.block or scores is not None:
            layer.compress(scores, None, positions >= 0 if layer.gaps else None)


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
    """Attention as transformers calls it; attention_mask is bool [B, keys], false for padding, or None."""
    layer = getattr(key, "thresher_layer", None)
    if layer is None:  # no cache, or another one
        queries, keys = query.shape[2], key.shape[2]
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        if padding is not None or (attention_mask is None and 1 < queries < keys):
            # PyTorch's own causal flag aligns the first query with the first key, not last with last.
            causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
            attention_mask = causal[None, None] if padding is None else causal & padding[:, None, None].bool()
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ArgumentError("dropout", dropout, "0 with a quantized cache", "Call model.eval().")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ArgumentError(
            "attention_mask",
            f"shape {tuple(attention_mask.shape)}",
            "[batch, tokens] with a quantized cache, whose slots are not in order",
            "Pass the padding mask; attention is causal.",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    real = None if attention_mask is None else attention_mask.bool()
    return layer.attend(query, scale, real).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)
