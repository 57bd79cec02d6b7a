"""What a Session does around a packed body: make the plan, gather its inputs, put its results back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher.errors import ThresherError
from thresher.graph.packed_layout import Counted, Gather, Packing, Passed, PlanField, Scatter

from .binpack import best_capacity, pack_dataset
from .buckets import ladder
from .plan import PackPlan, pack, plan, row_plan, unpack


def make_plan(mask: torch.Tensor, lengths: Sequence[int], packing: Packing) -> PackPlan:
    """The plan for one batch, in the form the packed program was made for."""
    if packing.form == "rows":
        capacity = max(packing.capacity, max(lengths))
        if not packing.capacity:
            capacity = best_capacity(lengths, packing.token_cost, packing.pair_cost)
        return row_plan(mask, pack_dataset(lengths, capacity), lengths=lengths)
    bucket = ladder(max(packing.limit, 1), packing.buckets) if packing.buckets else None
    return plan(mask, bucket=bucket, lengths=lengths)


def argument(
    where: Gather | PlanField | Passed | Counted, sources: Mapping[str, Sequence[Any]], packing: PackPlan
) -> Any:
    """One input of the body."""
    if isinstance(where, PlanField):
        columns = packing.cols if packing.segments is None else packing.cols.unflatten(0, packing.shape)
        return {"cu_seqlens": packing.cu_seqlens, "max_len": packing.max_len, "rows": packing.rows,
                "columns": columns, "segments": packing.segments}[where.name]  # fmt: skip
    if isinstance(where, Counted):
        filled = packing.cu_seqlens.shape[0] > packing.batch + 1
        lengths = [*packing.lengths, packing.filler] if filled else packing.lengths
        return where.of(lengths, sources["input"])
    tensor = sources[where.origin][where.index]
    if isinstance(where, Passed) or where.sequence is None:
        return tensor
    if where.batch == where.sequence:  # batch and sequence in one dimension
        return tensor.index_select(where.sequence, packing.idx)
    if where.batch is None:  # the same for every row
        if packing.shape[0] > 1:  # rows hold other positions each; files of earlier versions may ask for this
            raise ThresherError(
                "The packed program takes one table for rows of different positions. Compile it again."
            )
        return tensor.index_select(where.sequence, packing.cols)
    if tensor.shape[where.sequence] == 1:
        shape = list(tensor.shape)
        shape[where.sequence] = packing.width
        tensor = tensor.expand(shape)
    return pack(tensor, packing, (where.batch, where.sequence))


def restore(tensor: torch.Tensor, where: Scatter, packing: PackPlan) -> torch.Tensor:
    """One result of the body in the padded layout, zeros at pads."""
    if where.batch == where.sequence:
        shape = list(tensor.shape)
        shape[where.sequence] = packing.batch * packing.width
        real = packing.real(tensor.movedim(where.sequence, 0)).movedim(0, where.sequence)
        return tensor.new_zeros(shape).index_copy(where.sequence, packing.where, real)
    return unpack(tensor, packing, (where.batch, where.sequence))


def per_token(result: torch.Tensor) -> bool:
    """Whether a result is one that `outputs="packed"` leaves packed: hidden states and logits, not caches."""
    return result.is_floating_point() and result.dim() == 3
