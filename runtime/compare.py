"""Compares two programs on one caller's inputs, at real tokens, through the reference target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from thresher import site_counts
from thresher.graph.call_plan import Shortened
from thresher.graph.packed_layout import PackedLayout, Scatter
from thresher.graph.program import Program
from thresher.lowering.target import Target
from thresher.report import Report

from .call_session import run_built


def run_plainly(program: Program, inputs: Sequence[Any], plain: Target) -> list[Any]:
    """A program's results on the caller's inputs, packed or not."""
    return _run(program, inputs, plain)[0]


def run_with_extras(program: Program, inputs: Sequence[Any], plain: Target) -> list[Any]:
    """As `run_plainly`, with what the program gives beyond the caller's results behind them."""
    results, extras = _run(program, inputs, plain)
    return [*results, *extras.values()]


def _run(program: Program, inputs: Sequence[Any], plain: Target) -> tuple[list[Any], dict[str, Any]]:
    with site_counts.paused():
        return run_built(program, inputs, plain, Report("reference"))


def relative_difference(before: Program, after: Program, inputs: Sequence[Any], plain: Target) -> float:
    """Largest difference of any result, relative to that result's largest value; pads left out.

    Of results that a pruned program shortens, tokens that both kept are compared.
    A result that mixes positions (a pooler, a sliding cache) may read pads. Such elements are undefined in
    the padded model too: they are those that change with what stands at the pads, and are left out.
    NaN wherever exactly one of the two is not finite, so that the comparison fails.
    """
    layout: PackedLayout | None = after.packing
    if layout is not None and before.packing is None:
        after, inputs = _packing_always(after, layout), _with_padding(inputs, layout)
    (expected, kept), (actual, kept_after) = _run(before, inputs, plain), _run(after, inputs, plain)
    mask = before.real_tokens(inputs) if layout is None else None
    disturbed = None
    if layout is not None and layout.epilogue is not None:
        disturbed = run_plainly(before, _other_pads(inputs, layout), plain)
    worst = 0.0
    for index, (e, a) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(e, torch.Tensor) or not e.numel():
            continue
        short = [p.calls.shortened.get(index) if p.calls is not None else None for p in (before, after)]
        if any(short):
            e, a = _both_kept((e, a), short, (kept, kept_after))
        elif layout is not None and isinstance(where := layout.results[index], Scatter):
            e, a = (_real_tokens(t, where, inputs[layout.mask] != 0) for t in (e, a))
        elif mask is not None and e.shape[:2] == mask.shape:
            e, a = e[mask], a[mask]
        elif disturbed is not None and isinstance(disturbed[index], torch.Tensor):
            defined = torch.isclose(e, disturbed[index], rtol=1e-4, atol=1e-6, equal_nan=True)
            e, a = e[defined], a[defined]
        difference = _difference(e, a)
        if not difference <= worst:  # a NaN too, which max() would lose
            worst = difference
        if worst != worst:
            break
    return worst


def _packing_always(program: Program, layout: PackedLayout) -> Program:
    """The program with a layout that packs every batch with padding, whatever it gains, and hands back padded."""
    copy = program.copy()
    copy.packing = replace(layout, packing=replace(layout.packing, min_gain=0.0, outputs="padded"))
    return copy


def _with_padding(inputs: Sequence[Any], layout: PackedLayout) -> list[Any]:
    """The inputs, with a quarter of the last row masked out where nothing was: else nothing would be packed."""
    mask = inputs[layout.mask]
    if not (mask != 0).all():
        return list(inputs)
    padded = mask.clone()
    padded[-1, : max(1, mask.shape[1] // 4)] = 0
    return [padded if i == layout.mask else x for i, x in enumerate(inputs)]


def _both_kept(
    pair: Sequence[torch.Tensor], short: Sequence[Shortened | None], kept: Sequence[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, ...] of both results, for the tokens that both kept."""
    dim = next(s.dim for s in short if s is not None)
    moved = [t.movedim((0, dim), (0, 1)) for t in pair]
    whole = max(
        [t.shape[1] for t, s in zip(moved, short) if s is None or s.restored]
        + [int(k[s.kept].max()) + 1 for s, k in zip(short, kept) if s is not None]
    )
    batch = moved[0].shape[0]
    shared = torch.ones(batch, whole, dtype=torch.bool, device=moved[0].device)
    full = []
    for t, s, k in zip(moved, short, kept):
        if s is not None:
            index = k[s.kept].where(k[s.kept] >= 0, whole)  # a place not used goes to a spare column
            here = torch.zeros(batch, whole + 1, dtype=torch.bool, device=t.device).scatter_(1, index, True)
            shared &= here[:, :whole]
            if not s.restored:
                wide = t.new_zeros(batch, whole + 1, *t.shape[2:])
                wide[torch.arange(batch, device=t.device)[:, None], index] = t
                t = wide[:, :whole]
        full.append(t)
    return full[0][shared], full[1][shared]


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
