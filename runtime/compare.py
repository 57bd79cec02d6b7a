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

    A result that mixes positions (a pooler, a sliding cache) may read pads. Such elements are undefined in
    the padded model too: they are those that change with what stands at the pads, and are left out.
    NaN wherever exactly one of the two is not finite, so that the comparison fails.
    """
    expected, actual = run_plainly(before, inputs, plain), run_plainly(after, inputs, plain)
    layout: PackedLayout | None = after.packing
    disturbed = None
    if layout is not None and layout.epilogue is not None:
        disturbed = run_plainly(before, _other_pads(inputs, layout), plain)
    worst = 0.0
    for index, (e, a) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(e, torch.Tensor) or not e.numel():
            continue
        if layout is not None and isinstance(where := layout.results[index], Scatter):
            e, a = (_real_tokens(t, where, inputs[layout.mask] != 0) for t in (e, a))
        elif disturbed is not None and isinstance(disturbed[index], torch.Tensor):
            defined = torch.isclose(e, disturbed[index], rtol=1e-4, atol=1e-6, equal_nan=True)
            e, a = e[defined], a[defined]
        worst = max(worst, _difference(e, a))
    return worst


def _real_tokens(tensor: torch.Tensor, where: Scatter, real: torch.Tensor) -> torch.Tensor:
    if where.batch == where.sequence:
        return tensor.movedim(where.sequence, 0)[real.flatten()]
    return tensor.movedim((where.batch, where.sequence), (0, 1))[real]


def _other_pads(inputs: Sequence[Any], layout: PackedLayout) -> list[Any]:
    tokens, pads = inputs[layout.tokens], inputs[layout.mask] == 0
    changed = tokens.clone()
    if tokens.is_floating_point():
        changed[pads] += 1
    elif pads.any() and not pads.all():
        real = tokens[~pads]
        changed[pads] = torch.where(tokens[pads] == real.max(), real.min(), real.max())
    return [changed if i == layout.tokens else x for i, x in enumerate(inputs)]


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("nan")
    if not finite.any():  # all undefined, or empty
        return 0.0
    scale = expected[finite].abs().max().clamp_min(1e-30)
    return float((expected - actual)[finite].abs().max() / scale)
