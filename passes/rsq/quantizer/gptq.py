"""GPTQ on a token-weighted Hessian (Frantar et al., arXiv 2210.17323; RSQ section 3.3).

Columns are rounded one after another; the error of each is spread over the columns still to come so that the
layer's output on the calibration tokens changes least. All functions are pure apart from `Hessian.add`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError, ThresherError

from .grid import Grid, Parameters

_LEAF = 16  # columns handled one by one before their errors meet the rest in a matrix product
_STRIPE = 512  # columns of X^T X computed at a time; only the stripes' upper parts are needed


class HessianError(ThresherError):
    """X^T X cannot be factored: it is not finite, or stays singular under the largest damping allowed."""


@dataclass
class Hessian:
    """The running sum of w x x^T over tokens. Two fields to save, and a sum to resume from.

    total: fp32 [K, K], upper triangle. tokens: how many had a weight above zero.
    """

    total: torch.Tensor
    tokens: int = 0

    @staticmethod
    def empty(width: int, device: torch.device | str = "cpu") -> Hessian:
        """The Hessian fp32 [width, width] of no tokens yet."""
        return Hessian(torch.zeros(width, width, device=device))

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens. x: [..., K]; weights: [...], 0 at padding; None for 1 everywhere."""
        width = self.total.shape[0]
        if x.shape[-1] != width or (weights is not None and weights.shape != x.shape[:-1]):
            given = None if weights is None else tuple(weights.shape)
            raise ArgumentError(
                "x",
                f"{tuple(x.shape)} with weights {given}",
                f"[..., {width}] and [...]",
                "One weight a token.",
            )
        rows = x.reshape(-1, width).float()
        if weights is not None:
            flat = weights.reshape(-1).float()
            kept = flat > 0
            rows = rows[kept] * flat[kept].sqrt()[:, None]
        for first in range(0, width, _STRIPE):
            last = min(first + _STRIPE, width)
            self.total[first:last, first:].addmm_(rows[:, first:last].t(), rows[:, first:])
        self.tokens += rows.shape[0]

    def matrix(self) -> torch.Tensor:
        """fp64 [K, K]: H = 2/n sum w x x^T."""
        if self.tokens == 0:
            raise HessianError(
                "No calibration token reached this layer, so nothing is known about its inputs."
            )
        upper = torch.triu(self.total.double())
        return (upper + torch.triu(upper, 1).t()) * (2.0 / self.tokens)


@dataclass(frozen=True)
class Factor:
    """A factored Hessian, shared by all weights that read the same input.

    upper: fp32 [K, K] with upper^T upper = (P H P^T + damping)^-1. order: int64 [K], the column handled at
    each step, or None for 0 .. K-1. dead: bool [K], columns that no token reached. damping: what was
    added to the diagonal, as a share of its mean. raised: how often it had to be raised tenfold.
    """

    upper: torch.Tensor
    order: torch.Tensor | None
    dead: torch.Tensor
    damping: float
    raised: int


def factor(
    hessian: torch.Tensor, damping: float = 0.01, activation_order: bool = False, largest: float = 1.0
) -> Factor:
    """Factor H [K, K] for `gptq`.

    damping: share of the mean diagonal added to the diagonal; multiplied by ten, each time starting from
    the original H, until the factorisation succeeds or `largest` is passed. activation_order: handle the
    columns with the largest diagonal first. Raises HessianError.
    """
    if not 0 < damping <= largest:
        raise ArgumentError("damping", damping, f"0 < damping <= {largest}", "GPTQ uses 0.01.")
    if not bool(torch.isfinite(hessian).all()):
        raise HessianError(
            "X^T X holds NaN or inf: the layer's inputs overflowed or were NaN during calibration."
        )
    h = hessian.double().clone()
    diagonal = torch.diagonal(h)
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = mean
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else None
    if order is not None:
        h = h[order][:, order]
    # With J the reversal, chol(J H J) = L gives the upper factor of H^-1 as J L^-1 J: one factorisation
    # and one triangular inverse, where inverting H and factoring again would lose half the digits.
    h = h.flip(0, 1)
    raised = 0
    while True:
        lower, failed = torch.linalg.cholesky_ex(
            h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * mean)
        )
        if not int(failed):
            break
        if damping * 10 > largest:
            raise HessianError(
                f"X^T X is not positive definite even with {damping:g} of its mean diagonal added, after "
                f"raising the damping {raised} times. Use more calibration tokens or a larger damping."
            )
        damping, raised = damping * 10, raised + 1
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    return Factor(inverse.flip(0, 1).float(), order, dead, damping, raised)


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
