"""GPTQ on a token-weighted Hessian (Frantar et al., arXiv 2210.17323; RSQ section 3.3).

Columns are rounded one after another; the error of each is spread over the columns still to come so that the
layer's output on the calibration tokens changes least. All functions are pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError

from .grid import Grid, Parameters
from .hessian import Factor

_LEAF = 16  # columns handled one by one before their errors meet the rest in a matrix product


@dataclass(frozen=True)
class Quantized:
    """A quantised weight.

    codes: uint8 [N, K]. parameters: the grid's, each fp32 [N, groups]. values: fp32 [N, K], what the codes
    stand for. grid: the grid as bound to this weight.
    """

    codes: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    values: torch.Tensor
    grid: Grid


def gptq(weight: torch.Tensor, factored: Factor, grid: Grid, block: int = 128) -> Quantized:
    """Quantise weight [N, K] onto the grid, column by column in the factor's order.

    Rows are independent: weights that read the same input may be stacked. Without activation order a
    group's parameters are fitted when its first column is reached, from columns that already carry earlier
    errors; with it, all are fitted at the start, so that groups stay runs of columns and no index is stored.
    block: columns between updates of all the rest; it does not change the result beyond rounding.
    """
    _, width = _check(weight, grid)
    if factored.upper.shape[0] != width:
        raise ArgumentError(
            "factored",
            f"order {factored.upper.shape[0]}",
            f"order {width}",
            "Factor this layer's own Hessian.",
        )
    group = width if grid.group < 0 else grid.group
    if block % group and grid.group > 0:
        raise ArgumentError("block", block, f"a multiple of the group {group}", "GPTQ uses 128.")
    w = weight.float().masked_fill(factored.dead, 0.0)
    bound = grid.bind(w)
    order = factored.order
    early = order is not None or grid.group < 0
    fitted = _fit_all(bound, w, group) if early else []
    parameters: list[Parameters | None] = [None] * (width // group)

    # Columns are rows here, so that each is contiguous.
    w = (w if order is None else w[:, order]).t().contiguous()
    upper = factored.upper
    codes, values, errors = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)

    def parameters_of(j: int) -> Parameters:
        g = (j if order is None else int(order[j])) // group
        found = parameters[g]
        if found is None:
            if early:
                found = Parameters(p[:, g].contiguous() for p in fitted)
            else:
                found = bound.fit(w[j : j + group].t().contiguous())
            parameters[g] = found
        return found

    def handle(first: int, last: int) -> None:
        """Quantise columns first .. last, all of which already carry the errors of earlier ones."""
        if not early and first % group == 0 and last - first <= group:
            parameters_of(first)
        if last - first > _LEAF:
            # A power of two keeps halves aligned with groups: a group is never split before it is fitted.
            middle = first + (1 << (last - first - 1).bit_length() - 1)
            handle(first, middle)
            w[middle:last].addmm_(upper[first:middle, middle:last].t(), errors[first:middle], alpha=-1)
            handle(middle, last)
            return
        for j in range(first, last):
            used = parameters_of(j)
            codes[j] = bound.encode(w[j], used)
            values[j] = bound.decode(codes[j], used)
            torch.sub(w[j], values[j], out=errors[j])
            errors[j] /= upper[j, j]
            w[j + 1 : last].addr_(upper[j, j + 1 : last], errors[j], alpha=-1)

    for first in range(0, width, block):
        last = min(first + block, width)
        handle(first, last)
        w[last:].addmm_(upper[first:last, last:].t(), errors[first:last], alpha=-1)

    if order is not None:
        back = torch.argsort(order)
        codes, values = codes[back], values[back]
    stacked = fitted if early else [torch.stack(p, dim=1) for p in zip(*(p for p in parameters if p))]
    return Quantized(codes.t().contiguous().to(torch.uint8), tuple(stacked), values.t().contiguous(), bound)


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> Quantized:
    """The weight's nearest grid points, without calibration. weight: [N, K]."""
    rows, width = _check(weight, grid)
    group = width if grid.group < 0 else grid.group
    w = weight.float()
    bound = grid.bind(w)
    fitted = _fit_all(bound, w, group)
    split = w.reshape(rows, width // group, group)
    wide = Parameters(p[..., None] for p in fitted)
    codes = bound.encode(split, wide)
    values = bound.decode(codes, wide)
    return Quantized(
        codes.reshape(rows, width).to(torch.uint8), tuple(fitted), values.reshape(rows, width), bound
    )


def output_error(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """Share of the layer's weighted output energy that is lost: tr(D H D^T) / tr(W H W^T), D = W - values."""
    w, h = weight.float(), hessian.float()
    lost = w - values.float()
    return float(((lost @ h) * lost).sum() / ((w @ h) * w).sum().clamp_min(torch.finfo(torch.float32).tiny))


def _fit_all(grid: Grid, w: torch.Tensor, group: int) -> list[torch.Tensor]:
    """Parameters of every group of w [N, K], each [N, groups]."""
    rows, width = w.shape
    return [p.reshape(rows, width // group) for p in grid.fit(w.reshape(-1, group))]


def _check(weight: torch.Tensor, grid: Grid) -> tuple[int, int]:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ArgumentError(
            "weight", f"{weight.dtype} {tuple(weight.shape)}", "floating [N, K]", "Pass a matrix."
        )
    rows, width = weight.shape
    if grid.group > 0 and width % grid.group:
        raise ArgumentError(
            "group",
            grid.group,
            f"a divisor of in_features {width}",
            "Choose a group that divides, or -1 for a row.",
        )
    if not bool(torch.isfinite(weight).all()):
        raise ArgumentError("weight", "NaN or inf", "finite numbers", "Repair the checkpoint.")
    return rows, width
