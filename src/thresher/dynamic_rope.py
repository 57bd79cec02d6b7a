"""Rotary positions of the kind `dynamic` (NTK), whose frequencies follow the longest sequence that a model has met.

transformers decides in Python, from the positions' values, whether to compute frequencies anew, which cuts a model's graph.
Here the choice is one between tensors, and what is noted for the next call is written to the tensors it was read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def is_dynamic(part: torch.nn.Module) -> bool:
    """Whether a module is one of transformers' with such positions, for all layers or for those of some kind."""
    kinds = getattr(part, "rope_type", None)
    known = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    wrapped = hasattr(type(part).forward, "__wrapped__")
    own = "forward" in part.__dict__  # a hook, such as accelerate's, which the form would leave out
    return wrapped and not own and any(isinstance(k, str) and "dynamic" in k for k in known)


def _prefixes(part: Any) -> list[str]:
    if not isinstance(part.rope_type, Mapping):
        return [""]
    return [f"{layer}_" for layer, kind in part.rope_type.items() if "dynamic" in kind]


def prepare(part: Any) -> None:
    """Have what a module notes between calls lie in tensors of its own, which can be written in place."""
    for prefix in _prefixes(part):
        held, first = (getattr(part, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
        if held.dtype != torch.float32 or held.data_ptr() == first.data_ptr():
            # the model itself puts others in their place: of fp32 when it grows, the first when it shrinks
            held = held.float().clone()
            part.register_buffer(f"{prefix}inv_freq", held, persistent=False)
        name = f"{prefix}max_seq_len_cached"
        longest = getattr(part, name, part.max_seq_len_cached)
        if not isinstance(longest, torch.Tensor) or longest.device != held.device:
            setattr(part, name, torch.as_tensor(longest, dtype=torch.int64, device=held.device).clone())


def rotate(part: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
    """Cosines and sines for these positions, as the module's `forward` gives them and with what it notes."""
    kinds = part.rope_type
    kind = kinds if layer_type is None else kinds[layer_type]
    named = {} if layer_type is None else {"layer_type": layer_type}
    if "dynamic" not in kind:
        return type(part).forward(part, x, position_ids, **named)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer_type is None else f"{layer_type}_"
    held, first, longest = (
        getattr(part, prefix + name) for name in ("inv_freq", "original_inv_freq", "max_seq_len_cached")
    )
    tokens, usual = position_ids.max() + 1, part.original_max_seq_len
    grown, back = tokens > longest, (tokens < usual) & (longest > usual)
    more, _ = ROPE_INIT_FUNCTIONS[kind](part.config, x.device, seq_len=tokens, **named)
    held.copy_(torch.where(grown, more, torch.where(back, first, held)))
    longest.copy_(torch.where(grown, tokens, torch.where(back, usual, longest)))
    return type(part).forward.__wrapped__(part, x, position_ids, **named)
