"""Prepacking as published (arXiv 2404.09529, AISTATS 2025): the method to compare against.

A batch of prompts is bin-packed into fewer, fuller rows; one forward pass over the rows under a
dense block-causal mask fills a KV cache, which is taken apart again into one left-padded row per
prompt. Each prompt's last token is held back: it starts generation, so that the first decoding
step gives every prompt its first logits. Differences from the paper's program: one-token prompts,
which it cannot take, have an empty cache row here.

It multiplies padding and masked attention that segments avoid, and needs a model that takes a mask
[r, 1, w, w]; `thresher.runtime.packing.plan` is what Thresher itself runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError

from .collator import block_mask


@dataclass(frozen=True)
class Prepacked:
    """One batch of B prompts, ready for the model.

    input_ids, position_ids: int64 [r, w], prompts less their last token joined, positions restarting.
    mask: bool [r, 1, w, w], true where a token sees another.
    bins: the prompts of each row, in order. lengths: tokens of each prompt.
    last_tokens: int64 [B, 1]. attention_mask: int64 [B, m], left-padded, m the longest prompt: what
        `generate` needs to go on from the unpacked cache.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    bins: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    last_tokens: torch.Tensor
    attention_mask: torch.Tensor


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The paper's heuristic: longest first, each into the fullest row it still fits."""
    bins: list[list[int]] = []
    used: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b, u in enumerate(used) if u + lengths[item] <= capacity]
        if fitting:
            best = max(fitting, key=used.__getitem__)
            bins[best].append(item)
            used[best] += lengths[item]
        else:
            bins.append([item])
            used.append(lengths[item])
    return bins


def prepack(prompts: Sequence[Sequence[int]], pad_token_id: int = 0) -> Prepacked:
    """Join prompts into rows as long as the longest of them. Raises ArgumentError for an empty prompt."""
    lengths = [len(p) for p in prompts]
    if not prompts or min(lengths) == 0:
        raise ArgumentError(
            "prompts",
            "no prompt" if not prompts else f"an empty prompt at index {lengths.index(0)}",
            "at least one prompt, each of at least one token",
            "Start empty prompts with the beginning-of-text token.",
        )
    # As published, the capacity counts whole prompts although rows hold them less one token.
    bins = best_fit_decreasing(lengths, max(lengths))
    width = max(sum(lengths[i] - 1 for i in row) for row in bins)
    shape = (len(bins), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    position_ids, segment_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, members in enumerate(bins):
        at = 0
        for segment, member in enumerate(members, start=1):
            here = slice(at, at + lengths[member] - 1)
            input_ids[row, here] = torch.tensor(prompts[member][:-1], dtype=torch.int64)
            position_ids[row, here] = torch.arange(lengths[member] - 1)
            segment_ids[row, here] = segment
            at = here.stop
    longest = max(lengths)
    return Prepacked(
        input_ids=input_ids,
        position_ids=position_ids,
        mask=block_mask(segment_ids),
        bins=tuple(map(tuple, bins)),
        lengths=tuple(lengths),
        last_tokens=torch.tensor([[p[-1]] for p in prompts]),
        attention_mask=(torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long(),
    )


def unpack_cache(entry: torch.Tensor, batch: Prepacked) -> torch.Tensor:
    """One layer's keys or values [r, H, w, D] as [B, H, m - 1, D], left-padded with zeros."""
    longest = max(batch.lengths)
    out = entry.new_zeros(len(batch.lengths), entry.shape[1], longest - 1, entry.shape[3])
    for row, members in enumerate(batch.bins):
        at = 0
        for member in members:
            kept = batch.lengths[member] - 1
            out[member, :, longest - 1 - kept :] = entry[row, :, at : at + kept]
            at += kept
    return out
