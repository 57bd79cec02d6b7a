"""A random decoder small enough to be written out by hand, and prompts with an image's tokens in them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

IMAGE, TOKENS = 96, 48
SPAN = slice(4, 36)  # 32 image tokens
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
             initializer_range=0.15)  # fmt: skip


def make(**sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | sizes))).eval()


def prompt(batch: int = 2, tokens: int = TOKENS, seed: int = 0, span: slice | None = SPAN) -> torch.Tensor:
    """Ids [batch, tokens], those in `span` an image's."""
    ids = torch.randint(1, IMAGE, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    if span is not None:
        ids[:, span] = IMAGE
    return ids
