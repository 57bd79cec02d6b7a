"""Budgets by row and by image: how many tokens each row of a batch loses, and which.

A program keeps as many places in every row, `L`. A row that needs fewer has places left over: they stand last and hold a
token that was not kept, which causality hides from those before it, and masks from the rest. Padding never counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

import torch


def going(config: Any, keep: float, images: int, runs: Sequence[int] | None = None) -> int:
    """How many of a row's image tokens go where a share `keep` of them stays; a multiple of the bucket.

    runs: tokens of each of its images, of which each then loses its own share.
    """
    if images < config.min_image_tokens:
        return 0
    if runs is not None:
        return sum(min(n - 1, floor((1 - keep) * n + 1e-6)) for n in runs if n)
    gone = min(images - 1, floor((1 - keep) * images + 1e-6))
    return gone // config.bucket * config.bucket


def runs(image: torch.Tensor) -> torch.Tensor:
    """int64 [B, n]: which image a token belongs to, an image being neighbouring image tokens; of others, any."""
    begins = image & ~torch.nn.functional.pad(image[:, :-1], (1, 0))
    return (begins.long().cumsum(1) - 1).clamp_min(0)


def ranks_in_runs(score: torch.Tensor, image: torch.Tensor, run: torch.Tensor) -> torch.Tensor:
    """int64 [B, n]: how many tokens of the same image score higher, or as high and stand before; of others, any."""
    tokens = score.shape[1]
    order = score.float().nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    owner = torch.where(image, run, tokens)
    order = order.gather(1, owner.gather(1, order).argsort(dim=1, stable=True))  # by image, then by score
    counts = torch.zeros_like(run).scatter_add(1, run, image.long())
    first = (counts.cumsum(1) - counts).gather(1, run)
    place = torch.arange(tokens, device=score.device)[None].expand_as(order)
    return torch.zeros_like(order).scatter(1, order, place) - first


def choose(
    score: torch.Tensor,
    protected: torch.Tensor,
    pad: torch.Tensor | None,
    counts: torch.Tensor | None,
    places: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best `counts` [B] tokens of each row in `places` places, int64 [B, L], rising; and bool [B, L], false for
    places left over, which stand last. counts None: places of them in every row, and None."""
    best = torch.ops.thresher.topk_sorted(score, protected, pad, places, None)
    if counts is None:
        return best, None
    kept = torch.ops.thresher.topk_sorted(score, protected, pad, places, counts)
    tokens = score.shape[1]
    marks = torch.zeros_like(score[:, :1], dtype=torch.bool).expand(-1, tokens + 1)
    marks = marks.scatter(1, torch.where(kept < 0, tokens, kept), True)
    stays = marks.gather(1, best)
    order = (~stays).to(torch.int8).argsort(dim=1, stable=True)
    return best.gather(1, order), stays.gather(1, order)
