"""Packing for training: a collate function that joins sequences instead of padding them.

The sequences of one batch are sorted and joined, up to a maximum, into rows (first-fit decreasing).
The loss over the rows is the loss over the padded batch: the same tokens are predicted from the
same contexts, as long as attention stays within a sequence, for which either `cu_seqlens` or
`block_mask(segment_ids)` serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError

from .binpack import pack_dataset

IGNORE = -100  # the label PyTorch's cross entropy leaves out


@dataclass(frozen=True)
class PackingCollator:
    """Joins a batch's sequences into rows of at most `capacity` tokens; None makes one row of all.

    pad_token_id: fills the ends of rows shorter than the longest.

    Called with features that hold `input_ids` and, if they are not the same, `labels` (1-D, equal
    in length), it returns, for R rows of W tokens:
        input_ids, labels, position_ids   int64 [R, W]; positions restart with each sequence
        segment_ids                       int64 [R, W]; 1, 2, ... along a row, 0 at padding
        cu_seqlens                        int32; segment ends in the flattened rows [R * W], each
                                          row's padding being a segment
    The first label of each sequence is -100: a causal model predicts a token from the one before,
    which would be another sequence's last.

    Raises ArgumentError for a sequence longer than `capacity` and for labels of another length.
    """

    capacity: int | None = None
    pad_token_id: int = 0

    def __call__(
        self, features: Sequence[Mapping[str, Sequence[int] | torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        tokens = [torch.as_tensor(f["input_ids"], dtype=torch.int64) for f in features]
        labels = [_labels(f, ids, i) for i, (f, ids) in enumerate(zip(features, tokens))]
        lengths = [len(ids) for ids in tokens]
        bins = pack_dataset(lengths, sum(lengths) if self.capacity is None else self.capacity)
        shape = (len(bins), int(bins.used.max(initial=0)))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE, dtype=torch.int64),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
            "segment_ids": torch.zeros(shape, dtype=torch.int64),
        }
        ends = [0]
        for row, members in enumerate(bins):
            at = 0
            for segment, member in enumerate((m for m in members if lengths[m]), start=1):
                here = slice(at, at + lengths[member])
                batch["input_ids"][row, here] = tokens[member]
                batch["labels"][row, here] = labels[member]
                batch["position_ids"][row, here] = torch.arange(lengths[member])
                batch["segment_ids"][row, here] = segment
                at = here.stop
                ends.append(row * shape[1] + at)
            if at < shape[1]:
                ends.append((row + 1) * shape[1])
        return {**batch, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}


def _labels(
    feature: Mapping[str, Sequence[int] | torch.Tensor], tokens: torch.Tensor, index: int
) -> torch.Tensor:
    labels = torch.as_tensor(feature.get("labels", tokens), dtype=torch.int64).clone()
    if labels.shape != tokens.shape or tokens.dim() != 1:
        raise ArgumentError(
            f"features[{index}]",
            f"labels of shape {tuple(labels.shape)} and input_ids of shape {tuple(tokens.shape)}",
            "one label for each token of a flat sequence",
            "Use -100 as the label of tokens that should not be learned.",
        )
    labels[:1] = IGNORE
    return labels


def block_mask(segment_ids: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """bool [R, 1, W, W], true where a token sees another: same row, same segment, not later if causal.

    segment_ids: [R, W], 0 at padding, which sees only itself so that no softmax is empty.
    """
    seen = segment_ids[:, :, None] == segment_ids[:, None, :]
    width = segment_ids.shape[1]
    if causal:
        seen = seen & torch.ones(width, width, dtype=torch.bool, device=segment_ids.device).tril()
    own = torch.eye(width, dtype=torch.bool, device=segment_ids.device)
    return torch.where((segment_ids == 0)[:, :, None], own, seen)[:, None]
