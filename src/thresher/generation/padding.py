"""Rows padded on the right, moved: a decoder's next token stands behind its row's last one.

transformers warns of such rows and goes on behind the padding, from what the model makes of a pad.
"""

from __future__ import annotations

from typing import Any

import torch

from thresher.notices import warn

from .programs import cache_of

_PER_TOKEN = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids",
              "mm_token_type_ids", "cross_attention_mask")  # fmt: skip
SAID = (
    "Rows padded on the right go on behind their padding, so they are moved to the left for generate, and the sequences that"
    " come back begin with it. Set the tokenizer's padding_side='left' to have them so from the start."
)


def on_the_left(
    model: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`generate`'s arguments with all padding of a prompt in front; as they are where nothing is padded behind."""
    mask, cache = named.get("attention_mask"), cache_of(named)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not mask.shape[1]:
        return args, named
    if model.config.is_encoder_decoder or (cache is not None and cache.get_seq_length()):
        return args, named
    if bool((mask[:, -1] != 0).all()):
        return args, named
    tokens = next((t for t in (*args[:1], *map(named.get, _PER_TOKEN[:3])) if t is not None), None)
    if not isinstance(tokens, torch.Tensor) or tokens.shape[:2] != mask.shape:
        return args, named
    warn(SAID, stacklevel=5)
    order = (mask != 0).to(torch.int8).argsort(dim=1, stable=True)
    moved = {k: _moved(v, order) for k, v in named.items() if k in _PER_TOKEN}
    return (*(_moved(t, order) for t in args[:1]), *args[1:]), {**named, **moved}


def _moved(given: Any, order: torch.Tensor) -> Any:
    """A tensor [.., rows, tokens, ..] with its rows' tokens in this order, int64 [rows, tokens]; else as it is."""
    if not isinstance(given, torch.Tensor):
        return given
    rows, tokens = order.shape
    first = next((d for d in range(given.dim() - 1) if given.shape[d : d + 2] == (rows, tokens)), None)
    if first is None:
        return given
    shape = [1] * given.dim()
    shape[first : first + 2] = [rows, tokens]
    return given.gather(first + 1, order.to(given.device).view(shape).expand(given.shape))
