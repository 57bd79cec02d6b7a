"""Compares programs on one caller's inputs, at real tokens, through a plain target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from thresher import site_counts
from thresher.graph.call_plan import Shortened
from thresher.graph.packed_layout import PackedLayout, Scatter
from thresher.graph.program import Program
from thresher.lowering.target import Target
from thresher.report import Report

from .call_session import built, run_built
from .session import Session


@dataclass(frozen=True)
class Outcome:
    """What a program gave. extras: beyond the caller's results, by name."""

    program: Program
    results: list[Any]
    extras: dict[str, torch.Tensor]


def run_plainly(program: Program, inputs: Sequence[Any], plain: Target) -> list[Any]:
    """A program's results on the caller's inputs, packed or not."""
    return outcome(program, inputs, plain)[0].results


def run_with_extras(program: Program, inputs: Sequence[Any], plain: Target) -> list[Any]:
    """As `run_plainly`, with what the program gives beyond the caller's results behind them."""
    found = outcome(program, inputs, plain)[0]
    return [*found.results, *found.extras.values()]


def outcome(
    program: Program, inputs: Sequence[Any], plain: Target, session: Session | None = None
) -> tuple[Outcome, Session]:
    """What a program gives for the caller's inputs, without counting it among its sites' calls, and the session that ran
    it, which may run it again. session: such a one."""
    session = session or built(program, plain, Report(plain.name))
    with site_counts.paused():
        return Outcome(program, *run_built(session, inputs)), session


def as_packed(before: Program, after: Program, inputs: Sequence[Any]) -> tuple[Program, Sequence[Any]]:
    """Where `after` was packed and `before` was not: a copy that packs every batch with padding and hands back padded
    results, and inputs with padding where they had none. Else both as they are."""
    if after.packing is None or before.packing is not None:
        return after, inputs
    return always_packed(after), with_padding(inputs, after.packing)


class Comparison:
    """Which parts of the results of two programs mean the same.

    Of results that a pruned program shortens, tokens that both kept are compared; of others the real tokens.
    A result that mixes positions (a pooler, a sliding cache) may read pads. Such elements are undefined in
    the padded model too: they are those that change with what stands at the pads, and are left out; whole vectors along
    the last dimension, since in half precision one number among them may come out the same by chance.

    run: gives the results of the program before for changed inputs.
    """

    def __init__(
        self, before: Program, after: Program, inputs: Sequence[Any], run: Callable[[list[Any]], list[Any]]
    ):
        self.inputs, self._run = inputs, run
        self.layout: PackedLayout | None = after.packing
        self.mask = before.real_tokens(inputs) if self.layout is None else None

    @cached_property
    def disturbed(self) -> list[Any] | None:
        """The results of the program before where other tokens stand at the pads; None where no result mixes positions."""
        if self.layout is None or self.layout.epilogue is None:
            return None
        return self._run(_other_pads(self.inputs, self.layout))

    def parts(self, expected: Outcome, *others: Outcome) -> dict[int, tuple[torch.Tensor, ...]]:
        """For each result that is a tensor with elements, by number, what is to be compared of all these outcomes.

        The first is of the program before, in the precision it was written for.
        """
        found = {}
        for index, given in enumerate(zip(expected.results, *(o.results for o in others), strict=True)):
            if isinstance(given[0], torch.Tensor) and given[0].numel():
                found[index] = self._part(index, given, (expected, *others))
        return found

    def _part(self, index: int, given: tuple[Any, ...], of: tuple[Outcome, ...]) -> tuple[torch.Tensor, ...]:
        first = given[0]
        plans = [o.program.calls for o in of]
        short = [p.shortened.get(index) if p is not None else None for p in plans]
        if any(short):
            return _both_kept(given, short, [o.extras for o in of])
        if self.layout is not None and isinstance(where := self.layout.results[index], Scatter):
            real = self.inputs[self.layout.mask] != 0
            return tuple(_real_tokens(t, where, real) for t in given)
        if self.mask is not None and first.shape[:2] == self.mask.shape:
            return tuple(t[self.mask] for t in given)
        if self.disturbed is not None and isinstance(self.disturbed[index], torch.Tensor):
            defined = torch.isclose(first, self.disturbed[index], rtol=1e-4, atol=1e-6, equal_nan=True)
            if first.dim() > 1:
                defined = defined.all(-1, keepdim=True).expand_as(first)
            return tuple(t[defined] for t in given)
        return given


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference over the largest expected value; NaN where just one of the two is finite."""
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("nan")
    return _largest(expected, actual, finite)


def errors(true: torch.Tensor, own: torch.Tensor, actual: torch.Tensor) -> tuple[float, float]:
    """As `difference`, of a program's own result and of another's from the true one, where that and its own are finite.

    Half precision overflows where a wide one does not: such elements say nothing. The other's error is NaN where it alone
    is not finite, or alone is.
    """
    true, own, actual = true.double(), own.double(), actual.double()
    finite, there = true.isfinite() & own.isfinite(), actual.isfinite()
    undefined = ~true.isfinite() & ~own.isfinite()
    wrong = bool((finite & ~there).any() or (undefined & there).any())
    return _largest(true, own, finite), float("nan") if wrong else _largest(true, actual, finite)


def _largest(expected: torch.Tensor, actual: torch.Tensor, where: torch.Tensor) -> float:
    if not where.any():  # all undefined, or empty
        return 0.0
    scale = expected[where].abs().max().clamp_min(1e-30)
    return float((expected - actual)[where].abs().max() / scale)


def always_packed(program: Program) -> Program:
    """The program with a layout that packs every batch with padding, whatever it gains, and hands back padded."""
    copy, layout = program.copy(), program.packing
    copy.packing = replace(layout, packing=replace(layout.packing, min_gain=0.0, outputs="padded"))
    return copy


def with_padding(inputs: Sequence[Any], layout: PackedLayout) -> Sequence[Any]:
    """The inputs, with a quarter of the last row masked out where nothing was: else nothing would be packed."""
    mask = inputs[layout.mask]
    if not (mask != 0).all():
        return inputs
    padded = mask.clone()
    padded[-1, : max(1, mask.shape[1] // 4)] = 0
    return [padded if i == layout.mask else x for i, x in enumerate(inputs)]


def _both_kept(
    given: Sequence[torch.Tensor], short: Sequence[Shortened | None], kept: Sequence[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """[tokens, ...] of each result, for the tokens that all kept."""
    dim = next(s.dim for s in short if s is not None)
    moved = [t.movedim((0, dim), (0, 1)) for t in given]
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
    return tuple(t[shared] for t in full)


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
