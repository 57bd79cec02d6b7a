"""Compares two programs on one caller's inputs, at real tokens, through the reference target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thresher.layout import PackedLayout, Scatter
from thresher.lowering.target import Target
from thresher.program import Program
from thresher.report import Report

from .session import Session


def run_plainly(program: Program, inputs: Sequence[Any], plain: Target) -> list[Any]:
    """A program's results on the caller's inputs, packed or not."""
    session = Session(program, plain, plain, Report("reference"))
    return session(inputs, {})


def relative_difference(before: Program, after: Program, inputs: Sequence[Any], plain: Target) -> float:
    """Largest difference of any result, relative to that result's largest value; pads left out.

    NaN wherever exactly one of the two is not finite, so that the comparison fails.
    """
    expected, actual = run_plainly(before, inputs, plain), run_plainly(after, inputs, plain)
    layout: PackedLayout | None = after.packing
    worst = 0.0
    for index, (e, a) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(e, torch.Tensor) or not e.numel():
            continue
        if layout is not None and isinstance(where := layout.results[index], Scatter):
            e, a = (_real_tokens(t, where, inputs[layout.mask] != 0) for t in (e, a))
        worst = max(worst, _difference(e, a))
    return worst


def _real_tokens(tensor: torch.Tensor, where: Scatter, real: torch.Tensor) -> torch.Tensor:
    if where.batch == where.sequence:
        return tensor.movedim(where.sequence, 0)[real.flatten()]
    return tensor.movedim((where.batch, where.sequence), (0, 1))[real]


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("nan")
    if not finite.any():
        return 0.0
    scale = expected[finite].abs().max().clamp_min(1e-30)
    return float((expected - actual)[finite].abs().max() / scale)
