"""What a prompt's ids say of its tokens: which are an image's, and which are a user's question.

Passes find image tokens in the graph where they can. Where the code that puts image features in is run by Python, between
two graphs, the ids that a model's configuration names say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .given_tokens import IMAGE, VIDEO
from .recipe import Recipe

_MARKS = {
    f"{medium}_token_{end}": kind
    for medium, kind in (("image", IMAGE), ("audio", IMAGE), ("video", VIDEO))
    for end in ("id", "index")
}
_READERS = ("transprune", "zipvl")


def kinds(recipe: Recipe, config: Any, named: Mapping[str, Any]) -> torch.Tensor | None:
    """int8 [B, n]: token types of a prompt by its ids, for recipes that ask; None where the ids do not say."""
    ids = named.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] == 1:
        return None
    marks = {name: kind for name, kind in _MARKS.items() if isinstance(getattr(config, name, None), int)}
    asked = any(p.name in _READERS for p in recipe.passes)
    if not asked or not marks or getattr(config, "is_encoder_decoder", False):
        return None
    types = torch.zeros_like(ids, dtype=torch.int8)
    for name, kind in marks.items():
        types.masked_fill_(ids == getattr(config, name), kind)
    return types


def question(recipe: Recipe, named: Mapping[str, Any]) -> torch.Tensor | None:
    """bool [B, n]: the last user turn of each row of a prompt; None where the recipe knows no marks.

    A prompt of embeddings has no ids to read: no token of it asks, and the pass's other rule holds.
    """
    marks = next((m for m in (getattr(p, "user_turn", ()) for p in recipe.passes) if m), None)
    if marks is None:
        return None
    ids, embeddings = named.get("input_ids"), named.get("inputs_embeds")
    if ids is None:
        return None if embeddings is None else embeddings.new_zeros(embeddings.shape[:2], dtype=torch.bool)
    return last_turn(ids, *marks) if ids.shape[1] > 1 else None


def last_turn(ids: torch.Tensor, begin: Sequence[int], end: Sequence[int]) -> torch.Tensor:
    """bool [B, n]: what stands between the last `begin` of a row and the next `end`, or the row's end.

    ids: int [B, n]. Rows without `begin` have none.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    starts = torch.where(_found(ids, begin), place, -1).amax(1, keepdim=True)
    first = starts + len(begin)
    ends = torch.full_like(first, ids.shape[1])
    if end:
        behind = _found(ids, end) & (place >= first)
        ends = torch.where(behind, place, ids.shape[1]).amin(1, keepdim=True)
    return (starts >= 0) & (place >= first) & (place < ends)


def _found(ids: torch.Tensor, what: Sequence[int]) -> torch.Tensor:
    """bool [B, n]: where `what` begins."""
    width = ids.shape[1] - len(what) + 1
    if width <= 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    same = ids.unfold(1, len(what), 1) == torch.tensor(what, device=ids.device)
    return torch.nn.functional.pad(same.all(-1), (0, len(what) - 1))
