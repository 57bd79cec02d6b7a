"""An entry of the zoo, what every entry is made from, and how one is added: see `zoo`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import masks
import torch

SEED = 7
LENGTHS = (5, 8, 12)
WINDOW = 8  # LENGTHS has one row below it, one equal and one above
IMAGE_TOKEN = 90
TOKENS = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDTH = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
DECODER = dict(**TOKENS, **WIDTH, max_position_embeddings=64)
ENCODER = dict(vocab_size=96, pad_token_id=0, max_position_embeddings=64)

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One model and the facts about it that structure recovery must find.

    Attributes:
        make: builds the model, without arguments.
        inputs: builds keyword arguments for its forward.
        family: the transformers `model_type`.
        causal: a token sees no later token.
        attention, mlp: number of sites in the graph, all towers together.
        gated: the MLP multiplies two projections.
        activation: `relu`, `relu2`, `gelu`, `gelu_tanh` (as one op), `gelu_new` (tanh spelled out), `silu`.
        norm: `rms` or `layer`.
        positions: `rope`, `learned`, `counted` (learned, at the number of tokens so far that are not the pad
            token), `alibi` or `bias` (T5's relative bias).
        kv_heads: fewer than the 4 query heads means grouped-query attention.
        fused_qkv: one linear makes q, k and v.
        windows: per attention site, the sliding window in tokens, or None.
        softcap: attention logits go through tanh.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[], Inputs]
    family: str
    causal: bool
    attention: int
    mlp: int
    gated: bool
    activation: str
    norm: str
    positions: str
    kv_heads: int
    fused_qkv: bool
    windows: tuple[int | None, ...]
    softcap: bool

    def build(self, attention: str | None = None) -> tuple[torch.nn.Module, Inputs]:
        """The model in eval mode and example inputs; the same call gives the same numbers."""
        torch.manual_seed(SEED)
        model = self.make()
        if attention is not None:
            model.set_attn_implementation(attention)
        spread(model)
        return model.eval(), self.inputs()


def spread(model: torch.nn.Module) -> None:
    """Weights at which signals keep their size: matrices by fan-in, the rest near where it was."""
    rng = torch.Generator().manual_seed(SEED)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def tokens(mask: torch.Tensor | None = None) -> Inputs:
    """`input_ids` and `attention_mask`, int64 `[3, 12]`, padded on the right unless a mask is given."""
    mask = masks.right(LENGTHS) if mask is None else mask
    rng = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, IMAGE_TOKEN, mask.shape, generator=rng)
    return {"input_ids": ids.masked_fill(~mask.bool(), 0), "attention_mask": mask}


def pixels() -> Inputs:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(SEED))}


ZOO: dict[str, Entry] = {}


def add(
    name: str,
    make: Callable[[], torch.nn.Module],
    family: str,
    *,
    causal: bool = True,
    gated: bool = True,
    activation: str = "silu",
    norm: str = "rms",
    positions: str = "rope",
    kv_heads: int = 4,
    fused_qkv: bool = False,
    attention: int = 2,
    mlp: int = 2,
    windows: tuple[int | None, ...] | None = None,
    softcap: bool = False,
    inputs: Callable[[], Inputs] = tokens,
) -> None:
    sizes = (attention, mlp, gated, activation, norm, positions, kv_heads, fused_qkv)
    windows = (None,) * attention if windows is None else windows
    ZOO[name] = Entry(name, make, inputs, family, causal, *sizes, windows, softcap)
