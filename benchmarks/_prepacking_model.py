"""The decoder of the benchmark of prepacking, and its batches."""

from __future__ import annotations

import torch
import transformers as hf

ROWS, LONGEST, VOCABULARY, HIDDEN = 16, 512, 2048, 384


def decoder(layers: int) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def batch_of(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the right."""
    make = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, vocabulary, mask.shape, generator=make)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
