"""Approximate mode: which small activations of a GELU or SiLU may count as zero, and what that costs.

A neuron's part of the output is a_i W_i, so it is left out when |a_i| ||W_i|| is small: the threshold
for neuron i is t / ||W_i||, one t for each site (the score of WINA, arXiv 2505.19427). Calibration keeps
a sample of the hidden activations at real tokens; half of it sets thresholds, the other half says
what they cost. Layers then give up density greedily, where a byte saved costs least error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

SAMPLE = 512
KEPT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
"""Densities that are tried, from all on."""


class HiddenSample:
    """A collector: up to SAMPLE tokens' hidden activations [n, F], each real token as likely as another."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._kept = torch.empty(0)
        self._order = torch.empty(0)

    def add(self, value: torch.Tensor, real: torch.Tensor | None) -> None:
        """One batch's hidden activations [batch, sequence, F] or [rows, F]. real: bool [batch, sequence] or None."""
        if real is not None and value.shape[:2] == real.shape:
            value = value[real.to(value.device)]
        rows = value.detach().reshape(-1, value.shape[-1])
        order = torch.rand(rows.shape[0], generator=self._random)
        if self._kept.numel():
            order = torch.cat([self._order, order])
        best = order.topk(min(SAMPLE, len(order))).indices.sort().values
        old = best[best < len(self._order)]
        new = best[best >= len(self._order)] - len(self._order)
        fresh = rows[new.to(rows.device)].float().cpu()
        self._kept = torch.cat([self._kept[old], fresh]) if self._kept.numel() else fresh
        self._order = order[best]

    def result(self) -> dict[str, torch.Tensor]:
        """hidden: fp32 [n, F]."""
        return {"hidden": self._kept}


@dataclass(frozen=True)
class Threshold:
    """What was chosen for one site. limit: t. density: share kept. error: relative L2 of the MLP's output."""

    limit: float
    density: float
    error: float


@dataclass(frozen=True)
class Curve:
    """What densities cost at one site. limits, densities, errors: for each of KEPT. row_bytes: all neurons'."""

    limits: tuple[float, ...]
    densities: tuple[float, ...]
    errors: tuple[float, ...]
    row_bytes: int


def neuron_norms(weight: torch.Tensor) -> torch.Tensor:
    """L2 norms of a neuron-major weight's rows, fp32 [F], none of them zero."""
    return weight.float().norm(dim=1).clamp_min(1e-30)


def curve(hidden: torch.Tensor, weight: torch.Tensor) -> Curve:
    """The trade at one site. hidden: sample [n, F]; weight: neuron-major [F, D]."""
    wide = weight.detach().float().cpu()
    norms = neuron_norms(wide)
    chosen_on, held_out = hidden[::2].float(), hidden[1::2].float()
    held_out = held_out if len(held_out) else chosen_on
    scores = (chosen_on.abs() * norms).flatten()
    scores = scores[:: max(1, scores.numel() // 2_000_000)].sort().values
    whole = held_out @ wide
    size = whole.norm().clamp_min(1e-30)
    limits, densities, errors = [], [], []
    for kept in KEPT:
        place = min(int((1 - kept) * len(scores)), len(scores) - 1)
        limit = float(scores[place]) if kept < 1 else 0.0
        dropped = held_out.abs() * norms <= limit
        limits.append(limit)
        densities.append(float((~dropped).float().mean()))
        errors.append(float(((held_out * dropped) @ wide).norm() / size))
    return Curve(tuple(limits), tuple(densities), tuple(errors), weight.numel() * weight.element_size())


def choose(curves: Mapping[str, Curve], error: float) -> dict[str, Threshold]:
    """Lower densities step by step where a byte saved costs least squared error, within the budget.

    error: largest root mean square, over the sites, of the relative error of an MLP's output.
    """
    place = dict.fromkeys(curves, 0)
    allowed, spent = error**2 * len(curves), 0.0
    while True:
        best: tuple[float, str, int, float] | None = None
        for site, found in curves.items():
            here = place[site]
            for step in range(here + 1, len(KEPT)):  # a cheap step may hide behind a dear one
                cost = found.errors[step] ** 2 - found.errors[here] ** 2
                saved = (found.densities[here] - found.densities[step]) * found.row_bytes
                if saved <= 0 or spent + cost > allowed:
                    continue
                gain = saved / max(cost, 1e-30)
                if best is None or gain > best[0]:
                    best = (gain, site, step, cost)
        if best is None:
            break
        _, site, step, cost = best
        place[site], spent = step, spent + cost
    return {
        site: Threshold(curves[site].limits[i], curves[site].densities[i], curves[site].errors[i])
        for site, i in place.items()
    }


def root_mean_square(values: Sequence[float]) -> float:
    """The root of the mean of squares; 0 for no values."""
    return (sum(v * v for v in values) / len(values)) ** 0.5 if values else 0.0
