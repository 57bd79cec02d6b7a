"""Takes the real tokens out of a padded batch, and puts results back where the padding was.

A batch of B rows and S columns holds T real tokens. `plan` reads the padding mask once; `pack`
gathers [B, S, ...] tensors into one row [1, T, ...]; `unpack` scatters results back, zeros at pads.
Tokens keep the batch's order: row after row, columns rising. All of it runs outside the compiled
body, and a call waits for the device once, in `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from thresher.errors import ArgumentError
from thresher.recipe import MASK_NAME

from .binpack import Bins

MAX_TOKENS = 2**31 - 1  # offsets are int32, as every variable-length attention kernel wants them
_LAZY_ZEROS = 1 << 25  # bytes; from here on untouched zero pages cost more to clear than to ask for


@dataclass(frozen=True)
class PackPlan:
    """Where each packed token comes from. T counts real tokens, N = T + filler the packed ones.

    batch, width: the padded shape (B, S).
    lengths: real tokens of each row; max_len: the longest segment, filler included.
    tokens, filler: T, and the tokens added to reach a bucket; they repeat the first real token.
    idx: int64 [N], position in the flattened batch. rows, cols: int64 [N]; rows is -1 for filler.
    cu_seqlens: int32 [B + 1], or [B + 2] when a bucket was asked for: filler is the last segment,
        there even when empty, so that the shape depends on B alone.
    shape: how the N packed tokens lie, (1, N), or (rows, capacity) when sequences share rows (`row_plan`).
    slots: with rows, int64 [T], where each real token lies among the N; None when they come first, in order.
    segments: with rows, int64 [rows, capacity], the batch row of each packed token, -1 at filler.
    """

    batch: int
    width: int
    lengths: tuple[int, ...]
    max_len: int
    tokens: int
    filler: int
    idx: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    cu_seqlens: torch.Tensor
    shape: tuple[int, int] = (1, -1)
    slots: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    @property
    def total(self) -> int:
        """N, the number of packed tokens."""
        return self.tokens + self.filler

    @property
    def where(self) -> torch.Tensor:
        """int64 [T]: the position of each real token in the flattened batch, in the order of `real`."""
        return self.idx[: self.tokens] if self.slots is None else self.idx.index_select(0, self.slots)

    def real(self, packed: torch.Tensor) -> torch.Tensor:
        """The T real tokens of [N, ...] packed ones."""
        return packed[: self.tokens] if self.slots is None else packed.index_select(0, self.slots)

    @property
    def padding(self) -> float:
        """The share of the padded batch that is padding, 0 for an empty one."""
        positions = self.batch * self.width
        return 1 - self.tokens / positions if positions else 0.0


class Survey(NamedTuple):
    """lengths: real tokens (not 0) of each row. holed: some row has pads between them. strange: values other than
    0 and 1, of which only the model knows what they mean."""

    lengths: list[int]
    holed: bool
    strange: int


def row_lengths(mask: torch.Tensor, name: str = MASK_NAME) -> list[int]:
    """Real tokens of each row of a [B, S] padding mask. Raises ArgumentError for values other than 0 and 1."""
    lengths, _, strange = survey(mask, name)
    if strange:
        raise ArgumentError(
            name,
            f"{strange} values other than 0 and 1",
            "1 at real tokens and 0 at padding",
            "Additive masks and segment ids are not padding masks; pass mask.ne(0) if nonzero means real.",
        )
    return lengths


def survey(mask: torch.Tensor, name: str = MASK_NAME) -> Survey:
    """What a [B, S] padding mask holds. Waits for the device: the one wait of a call. name: what errors call it.

    Raises ArgumentError for a mask of another shape or dtype.
    """
    if mask.dim() != 2 or mask.dtype.is_complex:
        raise ArgumentError(
            name,
            f"{mask.dtype} of shape {tuple(mask.shape)}",
            "bool, integer or floating [batch, sequence]",
            "Pass the mask the tokenizer returned, not one expanded for attention.",
        )
    real = mask if mask.dtype == torch.bool else mask != 0
    counts, runs = real.sum(1), (real[:, 1:] > real[:, :-1]).sum() + real[:, :1].sum()
    strange = counts.new_zeros(()) if real is mask else (mask != real).sum()
    *lengths, begun, others = torch.cat([counts, runs.reshape(1), strange.reshape(1)]).tolist()
    return Survey(lengths, begun > sum(n > 0 for n in lengths), others)


def plan(
    mask: torch.Tensor, *, bucket: Callable[[int], int] | None = None, lengths: Sequence[int] | None = None
) -> PackPlan:
    """Find the real tokens of a padded batch.

    mask: [B, S], 1 or true at real tokens, anywhere in a row; bool, integer or floating.
    bucket: gives the number of packed tokens to fill up to from the number of real ones
        (`buckets.multiple_of(64)`); a batch without any real token stays empty.
    lengths: what `row_lengths` gave for this mask; None counts here.

    Raises ArgumentError as `row_lengths` does, for a bucket smaller than its batch, and for more tokens
    than int32 offsets can address.
    """
    lengths = row_lengths(mask) if lengths is None else lengths
    batch, width = mask.shape
    tokens = sum(lengths)
    total = bucket(tokens) if bucket is not None and tokens else tokens
    if total < tokens:
        raise ArgumentError(
            "bucket", total, f"at least the {tokens} tokens of the batch", "Round up, not down."
        )
    if total > MAX_TOKENS:
        raise ArgumentError("attention_mask", f"{total} tokens", f"at most {MAX_TOKENS}", "Split the batch.")

    # the size is known: no further wait
    idx = torch.nonzero_static(mask.reshape(-1), size=tokens)[:, 0]
    rows = torch.div(idx, max(width, 1), rounding_mode="floor")
    if total > tokens:
        repeats = idx[:1].expand(total - tokens)
        idx, rows = torch.cat([idx, repeats]), torch.cat([rows, repeats.new_full((total - tokens,), -1)])
    ends = [0, *accumulate(lengths)] + ([total] if bucket is not None else [])
    return PackPlan(
        batch=batch,
        width=width,
        lengths=tuple(lengths),
        max_len=max([*lengths, total - tokens], default=0),
        tokens=tokens,
        filler=total - tokens,
        idx=idx,
        rows=rows,
        cols=idx % max(width, 1),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32).to(mask.device, non_blocking=True),
        shape=(1, total),
    )


def row_plan(mask: torch.Tensor, bins: Bins, *, lengths: Sequence[int] | None = None) -> PackPlan:
    """A plan in which sequences share rows of fixed capacity, for targets that need rectangles.

    bins: which batch rows share which packed row (`thresher.pack_dataset`). The N = rows * capacity packed
    tokens include filler at the end of each row, which repeats the batch's first real token.
    """
    flat = plan(mask, lengths=lengths)
    shape = (max(len(bins), 1), bins.capacity)
    starts = [0] * flat.batch
    for row, members in enumerate(bins):
        at = row * bins.capacity
        for member in members:
            starts[member] = at
            at += flat.lengths[member]
    device = mask.device
    begins, offsets = (
        torch.tensor(x).to(device, non_blocking=True) for x in (starts, [0, *accumulate(flat.lengths)])
    )
    slots = torch.arange(flat.tokens, device=device) - offsets[flat.rows] + begins[flat.rows]
    total = shape[0] * shape[1]
    idx = (
        (flat.idx[:1] if flat.tokens else flat.idx.new_zeros(1)).repeat(total).index_copy(0, slots, flat.idx)
    )
    segments = flat.idx.new_full((total,), -1).index_copy(0, slots, flat.rows)
    return replace(flat, filler=total - flat.tokens, idx=idx, rows=segments, cols=idx % max(flat.width, 1),
                   max_len=bins.capacity, shape=shape, slots=slots, segments=segments.unflatten(0, shape))  # fmt: skip


def pack(tensor: torch.Tensor, plan: PackPlan, dims: tuple[int, int] = (0, 1)) -> torch.Tensor:
    """Gather the packed tokens: dim dims[0] of size B becomes 1, dim dims[1] of size S becomes N
    (with a `row_plan`: rows and capacity).

    A batch dim of size 1 stands for all rows (position ids, rotary tables). Raises ArgumentError
    when the sizes are not the plan's.
    """
    at_batch, at_width = _positions(tensor, dims)
    moved = tensor.movedim((at_batch, at_width), (0, 1))
    if moved.shape[0] not in (1, plan.batch) or moved.shape[1] != plan.width:
        raise ArgumentError(
            "tensor",
            f"shape {tuple(tensor.shape)}",
            f"size 1 or {plan.batch} in dim {at_batch} and {plan.width} in dim {at_width}",
            "Pack with the plan of the batch the tensor belongs to.",
        )
    if moved.shape[0] == 1:
        taken = moved[0].index_select(0, plan.cols)
    elif moved.stride(0) == moved.shape[1] * moved.stride(1):
        taken = moved.flatten(0, 1).index_select(0, plan.idx)
    else:  # flattening would copy the padding too
        taken = moved[torch.div(plan.idx, plan.width, rounding_mode="floor"), plan.cols]
    return taken.unflatten(0, plan.shape).movedim((0, 1), (at_batch, at_width))


def unpack(packed: torch.Tensor, plan: PackPlan, dims: tuple[int, int] = (0, 1)) -> torch.Tensor:
    """Undo `pack`: a new tensor with sizes B and S in `dims`, zeros at pads, filler dropped.

    It is stored with those dims outermost, which for keys and values [B, H, S, D] is how models
    hold them too. Raises ArgumentError when `packed` is not of the plan's size.
    """
    at_batch, at_width = _positions(packed, dims)
    moved = packed.movedim((at_batch, at_width), (0, 1))
    if moved.shape[:2] != plan.shape:
        raise ArgumentError(
            "packed",
            f"shape {tuple(packed.shape)}",
            f"size {plan.shape[0]} in dim {at_batch} and {plan.shape[1]} in dim {at_width}",
            "Unpack with the plan the tensor was packed with.",
        )
    out = _zeros(moved, (plan.batch * plan.width, *moved.shape[2:]))
    out.index_copy_(0, plan.where, plan.real(moved.flatten(0, 1)))
    return out.unflatten(0, (plan.batch, plan.width)).movedim((0, 1), (at_batch, at_width))


def _positions(tensor: torch.Tensor, dims: tuple[int, int]) -> tuple[int, int]:
    rank = tensor.dim()
    if rank < 2 or not all(-rank <= d < rank for d in dims) or (dims[0] - dims[1]) % rank == 0:
        raise ArgumentError(
            "dims",
            dims,
            f"two different dims of a tensor of rank {rank}",
            "Name the batch and sequence dims.",
        )
    return dims[0] % rank, dims[1] % rank


def _zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of `like`'s dtype and device. On a CPU, large ones leave the pads' memory untouched.

    torch.zeros writes every byte; the system's own zeroed pages cost nothing until written to.
    For logits [B, S, vocabulary] at 60 % padding that is four times faster.
    """
    size = int(np.prod(shape, dtype=np.int64)) * like.element_size()
    if like.device.type != "cpu" or like.requires_grad or size < _LAZY_ZEROS:
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(like.dtype).view(shape)
