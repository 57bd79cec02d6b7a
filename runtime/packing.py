"""Takes the real tokens out of a padded batch, and puts results back where the padding was.

A batch of B rows and S columns holds T real tokens. `plan` reads the padding mask once; `pack`
gathers [B, S, ...] tensors into one row [1, T, ...]; `unpack` scatters results back, zeros at pads.
Tokens keep the batch's order: row after row, columns rising. All of it runs outside the compiled
body, and a call waits for the device once, in `plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from thresher.errors import ArgumentError

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

    @property
    def total(self) -> int:
        """N, the number of packed tokens."""
        return self.tokens + self.filler

    @property
    def padding(self) -> float:
        """The share of the padded batch that is padding, 0 for an empty one."""
        positions = self.batch * self.width
        return 1 - self.tokens / positions if positions else 0.0


def multiple_of(step: int) -> Callable[[int], int]:
    """A bucket rule: round up to a multiple of `step`."""
    if step < 1:
        raise ArgumentError("step", step, "a positive number of tokens", "Use 64 or 128.")
    return lambda tokens: -(-tokens // step) * step


def geometric(ratio: float = 1.125, step: int = 64) -> Callable[[int], int]:
    """A bucket rule whose steps grow with T: at most `ratio` - 1 of filler, few distinct sizes."""
    if not ratio > 1:
        raise ArgumentError("ratio", ratio, "a number above 1", "Use 1.125.")
    aligned = multiple_of(step)

    def bucket(tokens: int) -> int:
        size = step
        while size < tokens:
            size = max(size + step, aligned(int(size * ratio)))
        return size

    return bucket


def plan(mask: torch.Tensor, *, bucket: Callable[[int], int] | None = None) -> PackPlan:
    """Find the real tokens of a padded batch. Waits for the device once.

    mask: [B, S], 1 or true at real tokens, anywhere in a row; bool, integer or floating.
    bucket: gives the number of packed tokens to fill up to from the number of real ones
        (`multiple_of(64)`); a batch without any real token stays empty.

    Raises ArgumentError for a mask of another shape or dtype or with values other than 0 and 1, a
    bucket smaller than its batch, and more tokens than int32 offsets can address.
    """
    if mask.dim() != 2 or mask.dtype.is_complex:
        raise ArgumentError(
            "attention_mask",
            f"{mask.dtype} of shape {tuple(mask.shape)}",
            "bool, integer or floating [batch, sequence]",
            "Pass the mask the tokenizer returned, not one expanded for attention.",
        )
    batch, width = mask.shape
    real = mask != 0
    counts = real.sum(1)
    strange = counts.new_zeros(1) if mask.dtype == torch.bool else (real & (mask != 1)).sum().reshape(1)
    *lengths, bad = torch.cat([counts, strange]).tolist()  # the one wait
    if bad:
        raise ArgumentError(
            "attention_mask",
            f"{bad} values other than 0 and 1",
            "1 at real tokens and 0 at padding",
            "Additive masks and segment ids are not padding masks; pass mask.ne(0) if nonzero means real.",
        )
    tokens = sum(lengths)
    total = bucket(tokens) if bucket is not None and tokens else tokens
    if total < tokens:
        raise ArgumentError(
            "bucket", total, f"at least the {tokens} tokens of the batch", "Round up, not down."
        )
    if total > MAX_TOKENS:
        raise ArgumentError("attention_mask", f"{total} tokens", f"at most {MAX_TOKENS}", "Split the batch.")

    idx = torch.nonzero_static(real.reshape(-1), size=tokens)[:, 0]  # the size is known: no further wait
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
    )


def pack(tensor: torch.Tensor, plan: PackPlan, dims: tuple[int, int] = (0, 1)) -> torch.Tensor:
    """Gather the packed tokens: dim dims[0] of size B becomes 1, dim dims[1] of size S becomes N.

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
    return taken.unsqueeze(0).movedim((0, 1), (at_batch, at_width))


def unpack(packed: torch.Tensor, plan: PackPlan, dims: tuple[int, int] = (0, 1)) -> torch.Tensor:
    """Undo `pack`: a new tensor with sizes B and S in `dims`, zeros at pads, filler dropped.

    It is stored with those dims outermost, which for keys and values [B, H, S, D] is how models
    hold them too. Raises ArgumentError when `packed` is not of the plan's size.
    """
    at_batch, at_width = _positions(packed, dims)
    moved = packed.movedim((at_batch, at_width), (0, 1))
    if moved.shape[:2] != (1, plan.total):
        raise ArgumentError(
            "packed",
            f"shape {tuple(packed.shape)}",
            f"size 1 in dim {at_batch} and {plan.total} in dim {at_width}",
            "Unpack with the plan the tensor was packed with.",
        )
    real = moved[0, : plan.tokens]
    out = _zeros(real, (plan.batch * plan.width, *real.shape[1:]))
    out.index_copy_(0, plan.idx[: plan.tokens], real)
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
