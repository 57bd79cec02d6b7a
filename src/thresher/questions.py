"""Which tokens of a call are a user's question, where the marks of a chat template are known (`user_turn` of a recipe)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .recipe import Recipe


def of_call(recipe: Recipe, named: Mapping[str, Any]) -> torch.Tensor | None:
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
