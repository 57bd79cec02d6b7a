"""X^T X of a linear's inputs, weighted by token, and its factor, in little more memory than the matrix itself.

GPTQ needs the upper triangular U with U^T U = H^-1. With V upper triangular and H = V V^T, U is V^-1: both are found
within the fp64 matrix, block by block from the last column to the first, and neither H^-1 nor a copy is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError, ThresherError

from .ranks import Ranks

_STRIPE = 512  # columns of the matrix handled at a time
_COLUMNS = 192  # of X^T X, computed at a time; only the stripes' upper parts are needed, and narrow ones leave out more
_BLOCK = 512  # columns factored at a time


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
            if not bool(kept.all()):
                rows, flat = rows[kept], flat[kept]
            rows = rows * flat.sqrt()[:, None]
        for first in range(0, width, _COLUMNS):
            last = min(first + _COLUMNS, width)
            self.total[first:last, first:].addmm_(rows[:, first:last].t(), rows[:, first:])
        self.tokens += rows.shape[0]

    def put_together(self, ranks: Ranks) -> None:
        """From here on it is that of all ranks' tokens."""
        tokens = torch.tensor(self.tokens)
        ranks.sum(self.total, tokens)
        self.tokens = int(tokens)

    def matrix(self) -> torch.Tensor:
        """fp64 [K, K]: H = 2/n sum w x x^T."""
        if self.tokens == 0:
            raise HessianError(
                "No calibration token reached this layer, so nothing is known about its inputs."
            )
        h = torch.empty_like(self.total, dtype=torch.float64)
        for first, last, rest in _stripes(len(h), _STRIPE):
            upper = torch.triu(self.total[first:last, first:].double()).mul_(2.0 / self.tokens)
            h[first:last, first:] = upper
            h[first:last, first:last] += torch.triu(upper[:, : last - first], 1).t()
            h[rest, first:last] = upper[:, last - first :].t()
        return h

    def whole(self) -> torch.Tensor:
        """fp32 [K, K]: the sum itself, whose lower triangle is filled in."""
        for first, last, rest in _stripes(len(self.total), _COLUMNS):
            self.total[rest, first:last] = self.total[first:last, rest].t()
        return self.total


def _stripes(width: int, step: int) -> list[tuple[int, int, slice]]:
    """(first, last, all that comes after) of each run of `step` columns."""
    firsts = range(0, width, step)
    return [(f, min(f + step, width), slice(min(f + step, width), width)) for f in firsts]


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
    hessian: torch.Tensor,
    damping: float = 0.01,
    activation_order: bool = False,
    largest: float = 1.0,
    consume: bool = False,
) -> Factor:
    """Factor H fp64 [K, K] for `gptq`.

    damping: share of the mean diagonal added to the diagonal; multiplied by ten, each time starting from
    the original H, until the factorisation succeeds or `largest` is passed. activation_order: handle the
    columns with the largest diagonal first. consume: work in `hessian` itself, whose values are lost. Raises
    HessianError.
    """
    if not 0 < damping <= largest:
        raise ArgumentError("damping", damping, f"0 < damping <= {largest}", "GPTQ uses 0.01.")
    if not all(bool(torch.isfinite(rows).all()) for rows in hessian.split(_STRIPE)):
        raise HessianError(
            "X^T X holds NaN or inf: the layer's inputs overflowed or were NaN during calibration."
        )
    h = hessian if consume and hessian.dtype == torch.float64 else hessian.double().clone()
    diagonal = torch.diagonal(h).clone()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = mean
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else None
    if order is not None:
        h, diagonal = h[order][:, order], diagonal[order]
    raised = 0
    while True:
        torch.diagonal(h).copy_(diagonal + damping * mean)
        if _factored(h):
            break
        if damping * 10 > largest:
            raise HessianError(
                f"X^T X is not positive definite even with {damping:g} of its mean diagonal added, after "
                f"raising the damping {raised} times. Use more calibration tokens or a larger damping."
            )
        damping, raised = damping * 10, raised + 1
        for first, last, rest in _stripes(len(h), _BLOCK):  # the lower triangle still holds H
            h[first:last, rest] = h[rest, first:last].t()
            corner = torch.tril(h[first:last, first:last], -1)
            h[first:last, first:last] = corner + corner.t()
    _invert(h)
    upper = torch.empty_like(h, dtype=torch.float32)
    for first, last, rest in _stripes(len(h), _BLOCK):
        upper[rest, first:last] = 0.0
        upper[first:last, first:] = torch.triu(h[first:last, first:])
    return Factor(upper, order, dead, damping, raised)


def _factored(h: torch.Tensor) -> bool:
    """Put V, upper triangular with V V^T = H, into the upper triangle of h; False where there is none.

    The triangle below the diagonal keeps H.
    """
    for first, last, _ in reversed(_stripes(len(h), _BLOCK)):
        corner = h[first:last, first:last]
        upper = torch.triu(corner)
        # A reversed matrix's lower factor, reversed, is its upper one.
        lower, failed = torch.linalg.cholesky_ex((upper + torch.triu(upper, 1).t()).flip(0, 1))
        if int(failed):
            return False
        upper = lower.flip(0, 1)
        corner.copy_(torch.tril(corner, -1) + upper)
        panel = torch.linalg.solve_triangular(upper, h[:first, first:last].t(), upper=True).t()
        h[:first, first:last] = panel
        for left, right, _ in _stripes(first, _BLOCK):
            rows = panel[left:right].t()
            h[:left, left:right].addmm_(panel[:left], rows, alpha=-1)
            h[left:right, left:right] -= torch.triu(panel[left:right] @ rows)
    return True


def _invert(h: torch.Tensor) -> None:
    """Put the inverse of the upper triangle of h, a triangular matrix, in its place."""
    for first, last, _ in _stripes(len(h), _BLOCK):
        corner = torch.triu(h[first:last, first:last])
        eye = torch.eye(last - first, dtype=h.dtype, device=h.device)
        inverse = torch.linalg.solve_triangular(corner, eye, upper=True)
        panel = h[:first, first:last] @ inverse
        for top, bottom, _ in _stripes(first, _BLOCK):
            rows = torch.triu(h[top:bottom, top:first])
            h[top:bottom, first:last] = (rows @ panel[top:]).neg_()
        h[first:last, first:last] = inverse


@dataclass
class Drift:
    """How far a linear's inputs are from the original model's, with the linears before it quantised.

    total: fp32 [K, K], the running sum of w (x - y) y^T over tokens: x the original's input, y what it has become.
    """

    total: torch.Tensor

    @staticmethod
    def empty(width: int, device: torch.device | str = "cpu") -> Drift:
        """Of no tokens yet."""
        return Drift(torch.zeros(width, width, device=device))

    def add(self, original: torch.Tensor, now: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens. original, now: [..., K]; weights: as `Hessian.add` takes them."""
        width = self.total.shape[0]
        y = now.reshape(-1, width).float()
        apart = original.reshape(-1, width).float() - y
        if weights is not None:
            flat = weights.reshape(-1).float()
            kept = flat > 0
            y, apart = y[kept], apart[kept] * flat[kept][:, None]
        self.total.addmm_(apart.t(), y)

    def correction(self, factored: Factor, tokens: int) -> torch.Tensor:
        """fp32 [K, K] G, so that W + W G is what gives W's outputs on the original inputs from those it has now.

        The least squares answer sum w (x - y) y^T (sum w y y^T)^-1, with the damping of the factor. tokens: as the
        Hessian counted them.
        """
        g = self.total * (2.0 / tokens)
        g[:, factored.dead] = 0.0
        if factored.order is not None:
            g = g[:, factored.order]
        g = (g @ factored.upper.t()) @ factored.upper
        return g if factored.order is None else g[:, torch.argsort(factored.order)]
