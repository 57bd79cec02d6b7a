"""What the NVFP4 pass learns from data: the range of each linear's input, and which linears suffer most.

The sensitivity of a linear is the relative error that rounding its weights causes in its own output,

    e^2 = sum_nk E[x_k^2] (w_nk - q_nk)^2 / sum_nk E[x_k^2] w_nk^2,

the expected squared error when input features are uncorrelated: a weight counts by how much its input
feature carries, which is what separates layers with outlier features from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from thresher.formats.nvfp4 import dequantized
from thresher.graph.program import Program
from thresher.report import Miss

from ..structure.recover import LinearSite


class InputStatistics:
    """Of a linear's input [..., K] at real tokens: `amax` fp32 [] and `square_mean` fp32 [K]."""

    def __init__(self) -> None:
        self.amax = torch.zeros(())
        self.total: torch.Tensor | None = None
        self.rows = 0

    def add(self, value: torch.Tensor, real: torch.Tensor | None) -> None:
        """One batch. Rows that are not [batch, sequence] (a pooled token, a packed row) all count."""
        rows = value[real] if real is not None and value.shape[:-1] == real.shape else value.flatten(0, -2)
        if not rows.numel():
            return
        rows = rows.float()
        self.amax = torch.maximum(self.amax, rows.abs().max().cpu())
        squares = rows.square().sum(0)
        self.total = squares if self.total is None else self.total + squares
        self.rows += rows.shape[0]

    def merge(self, other: InputStatistics) -> None:
        """Take in what another gathered on other batches of the same linear."""
        self.amax, self.rows = torch.maximum(self.amax, other.amax), self.rows + other.rows
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total

    def result(self) -> dict[str, torch.Tensor]:
        """`amax` fp32 [] and `square_mean` fp32 [K], or [0] where no token was seen."""
        total = torch.zeros(0) if self.total is None else self.total / max(1, self.rows)
        return {"amax": self.amax, "square_mean": total.cpu()}


def sensitivity(
    weight: torch.Tensor, square_mean: torch.Tensor, quantize: Callable[..., tuple[torch.Tensor, ...]]
) -> float:
    """Relative output error of rounding `weight` [N, K] under inputs of that mean square [K]."""
    rounded = dequantized(*quantize(weight))[:, : weight.shape[1]]
    importance = square_mean.to(weight.device).float()
    weight = weight.float()
    error = ((rounded - weight).square() @ importance).sum()
    return float((error / (weight.square() @ importance).sum().clamp_min(1e-30)).sqrt())


def most_sensitive(
    program: Program,
    sites: Sequence[LinearSite],
    stats: Mapping[str, Mapping[str, torch.Tensor]],
    share: float,
    quantize: Callable[..., tuple[torch.Tensor, ...]],
) -> dict[LinearSite, Miss]:
    """The linears with the largest sensitivity, up to `share` of all weights of `sites`, as Misses."""
    errors = {}
    for site in sites:
        weight = program.weights[site.weight].tensor
        weight = weight.t() if site.transposed else weight
        errors[site] = sensitivity(weight, stats[site.fqn]["square_mean"], quantize)
    size = {s: s.in_features * s.out_features for s in sites}
    left = share * sum(size.values())
    kept = {}
    for site in sorted(sites, key=lambda s: -errors[s]):
        if size[site] > left:
            break
        left -= size[site]
        kept[site] = Miss(
            site.fqn,
            f"It is among the most sensitive linears: rounding its weights would change its own output by "
            f"{100 * errors[site]:.1f} %; sensitive={share:g} keeps the worst.",
        )
    return kept
