"""The model: a window MLP in front of an unmodified Hugging Face Llama with grouped-query attention."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from . import data

_WINDOW = 3 * data.PATCH  # a patch and its neighbours: always holds the whole cell it lies in


class Encoder(nn.Module):
    """Images [B, 3, 40, 40] to image tokens [B, 100, d]; each reads the 12x12 pixels around its patch."""

    def __init__(self, width: int, hidden: int = 256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * _WINDOW**2, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        windows = nn.functional.unfold(images, _WINDOW, padding=data.PATCH, stride=data.PATCH)
        return self.layers(windows.transpose(1, 2))


class TinyVLM(nn.Module):
    """Image tokens first, text behind them, one causal decoder (1.03 million parameters)."""

    def __init__(self, layers: int = 6, width: int = 128):
        super().__init__()
        self.encoder = Encoder(width)
        self.decoder = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=data.VOCABULARY,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                pad_token_id=data.PAD,
                bos_token_id=None,
                eos_token_id=None,
                tie_word_embeddings=False,
            )
        )

    def embed(self, images: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder input for images [B, 3, 40, 40] and the text [B, t] behind them.

        Returns embeddings [B, 100 + t, d] and token types int8 [B, 100 + t] (0 text, 1 image).
        """
        tokens = torch.cat([self.encoder(images), self.decoder.get_input_embeddings()(text)], dim=1)
        types = torch.zeros(tokens.shape[:2], dtype=torch.int8)
        types[:, : data.PATCHES] = 1
        return tokens, types

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Logits [B, 100 + t, vocabulary]."""
        return self.decoder(inputs_embeds=self.embed(images, text)[0], use_cache=False).logits
