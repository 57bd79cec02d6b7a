"""The decoder and the prompts of the benchmark of token pruning, and how its forms are timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _harness import Timing, alone, interleave
from transformers import LlamaConfig, LlamaForCausalLM

import thresher

IMAGE = 96


def timed(args: argparse.Namespace, forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """`interleave`, alone on the machine as far as a lock file tells."""
    for form in forms.values():
        form()  # what compiles does so before the lock is taken
    with alone(args.lock):
        return interleave(forms, rounds=rounds, warmup=1)


def llama(layers: int = 8, width: int = 256, **more: Any) -> LlamaForCausalLM:
    """A random decoder with grouped-query attention, of the sheet's proportions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16384,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def prompt(batch: int, tokens: int, text: int = 64) -> torch.Tensor:
    """Ids: 16 text tokens, the image, and the rest of the text."""
    ids = torch.randint(1, IMAGE, (batch, tokens), generator=torch.Generator().manual_seed(1))
    ids[:, 16 : 16 + tokens - text] = IMAGE
    return ids


def compiled(model: LlamaForCausalLM, inputs: dict[str, Any], target: str, **recipe: Any) -> Any:
    torch._dynamo.reset()
    return thresher.compile(model, inputs, target=target, dynamic=False, verify=False, **recipe)
