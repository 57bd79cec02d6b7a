"""Judges a rewrite by the precision that the program computes in.

A pass that is exact on paper sums in another order, and what that changes depends on the dtype: 1e-6 in fp32, 1e-2 in
bf16. So the captured program is run in a higher precision, and a rewritten one may be FACTOR times as far from that as
the captured one itself is, plus a floor. What rounding would hide, one key too many among hundreds, shows where both
programs are run in the higher precision: there they must be the same.

    other lengths     few short rows of 1, 2, 3, half and all columns; as written, and both in the higher precision: a
                      result further off by chance is then kept below the program's own error in any result
    example           as given; the rewritten program against the captured one, and where that leaves a doubt, both
                      against the higher precision
    either            where a token chose otherwise on a near tie (an expert), the same with all choices made alike
    permuted, scaled  like the example

All but the example have few rows: of a program that was captured for a fixed number of them, a copy for fewer is made,
and what does not hold there is judged once more by the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from thresher.graph.program import Program
from thresher.lowering.raised import Raised, narrowest, wider
from thresher.lowering.target import Target
from thresher.phases import VERIFICATION, phase
from thresher.verdict import FACTOR, FLOOR, SAME, Verdict

from . import batches, choices
from .batches import Batch
from .compare import Comparison, Outcome, difference, errors
from .fewer_rows import rows_of
from .measured import Found, dtype_name, sentence
from .runs import CANNOT, Runs
from .witness import FEW, expected_errors

_LEAST_SHARE = 4  # of the example's rows that are taken, one in so many
_LEAST_ROWS = 2  # packed beside one another


class Judge:
    """Judges the passes of one pipeline on one caller's inputs.

    captured: the program as it was captured. plain: runs programs as they are written. agree: the largest of a number
    over all ranks that must decide alike. fixed: by the passes' budgets alone, on the example alone.
    """

    def __init__(
        self,
        captured: Program,
        inputs: Sequence[Any],
        plain: Target,
        agree: Callable[[float], float] = float,
        fixed: bool = False,
    ):
        self.captured, self.plain, self.agree, self.fixed = captured, plain, agree, fixed
        self.dtype = narrowest(captured)
        self.wide = wider(self.dtype)
        self.raised = Raised(self.wide)
        self.example = batches.example(captured, inputs)
        self.cannot: str | None = None  # why the captured program does not run in the higher precision
        self._runs = Runs(plain)
        self._kept: dict[Any, Any] = {}

    @cached_property
    def all(self) -> list[Batch]:
        """The batches, the cheap and telling one first. Those that the captured program refuses are no batches of its."""
        return self._with_example(batches.further(self.captured, self.example.inputs))

    @cached_property
    def small(self) -> list[Batch] | None:
        """The same, with fewer rows where the program was captured for a fixed number of them; None where it was not, or
        has few, or a copy for fewer gives other results for the example's first rows than it does itself."""
        rows = rows_of(self.captured)
        few = max(_LEAST_ROWS, min(batches.ROWS, (rows or 0) // _LEAST_SHARE))
        if rows is None or rows < _LEAST_SHARE * _LEAST_ROWS:
            return None
        whole = self._low(self.captured, self.example, self.example.inputs)
        unlike = self._runs.unlike_with(self.captured, rows, few, self.example.inputs, whole)
        if not self.agree(unlike) <= 2 * FLOOR[self.dtype]:
            return None
        found = self._with_example(batches.further(self.captured, self.example.inputs, few))
        return found if len(found) > 1 else None

    def _with_example(self, further: Sequence[Batch]) -> list[Batch]:
        found = []
        for batch in further:
            try:
                self._low(self._at(batch, self.captured), batch, batch.inputs)
            except CANNOT:
                continue
            found.append(batch)
        return [*found[:1], self.example, *found[1:]]

    def _at(self, batch: Batch, program: Program) -> Program:
        """A program for a batch's number of rows."""
        if batch.rows is None:
            return program
        made = self._runs.fewer(program, rows_of(self.captured) or 0, batch.rows)
        assert made is not None
        return made

    def _has_small(self, program: Program) -> bool:
        few = next(b.rows for b in self.small or () if b.rows is not None)
        return self._runs.fewer(program, rows_of(self.captured) or 0, few) is not None

    def _all_agree(self, true: bool) -> bool:
        return self.agree(0.0 if true else 1.0) == 0.0

    @phase(VERIFICATION)
    def exact(self, before: Program, after: Program, budget: float, anchored: bool = True) -> Verdict:
        """Judge a pass that changes nothing but rounding.

        anchored: every pass before it was exact too, so that the captured program says what is right; else the program
        before does. budget: what may change under `fixed`, or where nothing can be run in the higher precision.
        """
        if self.fixed or after.calls is not None or before.calls is not None:
            return self.within(before, after, budget)
        self._runs.keep_only(self.captured, before)
        base = self.captured if anchored else before
        if self.small is not None and self._all_agree(self._has_small(base) and self._has_small(after)):
            verdict = self._on_all(self.small, base, after, budget, anchored)
            if verdict.holds:
                return verdict
        return self._on_all(self.all, base, after, budget, anchored)

    def _on_all(
        self, chosen: Sequence[Batch], base: Program, after: Program, budget: float, anchored: bool
    ) -> Verdict:
        done = []
        for batch in chosen:
            first = batch is chosen[0]
            found = self._on(batch, self._at(batch, base), self._at(batch, after), budget, anchored, first)
            done.append((batch, found))
            if not found.holds:
                break
        return self._verdict(done)

    @phase(VERIFICATION)
    def within(self, before: Program, after: Program, budget: float) -> Verdict:
        """Judge a pass by how far it moved the program's results on the example: no further than its budget, beside
        which the rounding of both programs is allowed."""
        batch = self.example
        self._runs.keep_only(self.captured, before)
        packed, inputs = self._runs.packed(before, after, batch.inputs)
        comparison = self._runs.comparison(before, packed, inputs)
        low, made = self._low(before, batch, inputs), self._runs.outcome(packed, inputs, self.plain)
        error = self._most([difference(e, a) for e, a in comparison.parts(low, made).values()])
        if error <= budget or error != error or self.fixed:
            return self._verdict([(batch, Found(error, budget))])
        allowed = budget + (1 + FACTOR) * self.rounding
        return self._verdict([(batch, Found(error, allowed))])

    @cached_property
    def rounding(self) -> float:
        """The captured program's own error on the first batch; 0 where it cannot be told."""
        batch = (self.small or self.all)[0]
        captured = self._at(batch, self.captured)
        low, true = self._low(captured, batch, batch.inputs), self._true(batch, batch.inputs)
        if true is None:
            return 0.0
        parts = self._runs.comparison(captured, captured, batch.inputs).parts(low, true)
        return self._most([errors(t, o, o)[0] for o, t in parts.values()])

    def _on(
        self, batch: Batch, base: Program, after: Program, budget: float, anchored: bool, first: bool
    ) -> Found:
        packed, inputs = self._runs.packed(base, after, batch.inputs)
        low = self._low(base, batch, inputs)
        try:
            made = self._runs.outcome(packed, inputs, self.plain)
        except CANNOT as reason:
            return Found(
                float("nan"), 0.0, why=f"the rewritten program raised {type(reason).__name__}: {reason}"
            )
        comparison = self._runs.comparison(base, packed, inputs)
        if not first or not anchored:
            error = self._most([difference(e, a) for e, a in comparison.parts(low, made).values()])
            limit = FLOOR[self.dtype] + (1 + FACTOR) * self.rounding
            if error <= limit or not anchored or self.cannot is not None:
                return Found(error, limit if self.cannot is None else max(limit, budget))
        true = self._true(batch, inputs)
        if true is None:
            error = self._most([difference(e, a) for e, a in comparison.parts(low, made).values()])
            return Found(error, max(budget, FLOOR[self.dtype]))
        worst = Found(0.0, FLOOR[self.dtype], 0.0)
        for place, (o, t, a) in comparison.parts(low, true, made).items():
            own, error = errors(t, o, a)
            told = max(own, self._expected(batch, inputs, place)) if t.numel() < FEW else own
            found = self._found(error, told, own)
            worst = found if found.share >= worst.share else worst
        doubted = not worst.holds and worst.error == worst.error and anchored
        if not doubted and not (first and worst.holds):
            return worst
        wide = self._in_wide(base, packed, inputs, comparison, low, true)
        if worst.holds:
            return worst if wide is None or wide.holds else wide
        if wide is None or not wide.holds:
            return worst
        found = self._found(worst.error, self.noise, worst.own or 0.0)
        return found if found.holds else self._choosing_alike(base, packed, inputs, comparison, found)

    def _choosing_alike(
        self, base: Program, after: Program, inputs: Sequence[Any], comparison: Comparison, found: Found
    ) -> Found:
        """What was found, with both programs made to choose alike where each choice was open to both; see `choices`."""
        real = inputs[after.packing.mask] != 0 if after.packing is not None else None
        alike = choices.alike(base, after, inputs, (self.plain, self.raised), real, FLOOR[self.dtype])
        if not self._all_agree(alike is not None) or alike is None:
            return found
        told = [errors(t, o, a) for o, t, a in comparison.parts(*alike).values()]
        own = max((o for o, _ in told), default=0.0)
        return self._found(self._most([e for _, e in told]), max(own, self.noise), own)

    def _found(self, error: float, told: float, own: float) -> Found:
        return Found(self.agree(error), self.agree(FACTOR * told + FLOOR[self.dtype]), self.agree(own))

    @cached_property
    def noise(self) -> float:
        """The captured program's own error, the largest of all results and batches.

        What one result of one batch shows is a single draw: a step adds one token a row to each of its results, and where
        one layer amplifies what an earlier one rounded, all behind it differ. Two programs that are the same in the higher
        precision, and round alike, were seen three times apart there.
        """
        most = [self.rounding]
        for batch in self.small or self.all:
            captured, inputs = self._at(batch, self.captured), batch.inputs
            low, true = self._low(captured, batch, inputs), self._true(batch, inputs)
            if true is not None:
                parts = self._runs.comparison(captured, captured, inputs).parts(low, true)
                most += [errors(t, o, o)[0] for o, t in parts.values()]
        return self._most(most)

    def _in_wide(
        self,
        base: Program,
        after: Program,
        inputs: Sequence[Any],
        comparison: Comparison,
        low: Outcome,
        true: Outcome,
    ) -> Found | None:
        """The rewritten program in the higher precision, where it must be the same; None where it does not run so."""
        try:
            made = self._runs.outcome(after, inputs, self.raised)
        except CANNOT:  # an operator that takes no such precision: what is written down was compared already
            return None
        error = self._most([errors(t, t, a)[1] for _, t, a in comparison.parts(low, true, made).values()])
        known = {w.fqn for w in base.weights.values()}
        rounded = any(
            w.source and w.fqn not in known for w in after.weights.values()
        )  # made in the narrow dtype
        limit = FLOOR[self.dtype] if rounded else SAME[self.dtype]
        shown = f"both programs were computed in {dtype_name(self.wide)}"
        return Found(error, limit, 0.0, why=shown)

    def _low(self, program: Program, batch: Batch, inputs: Sequence[Any]) -> Outcome:
        """A program's results as it is written; the captured one's are kept."""
        if program is not self._at(batch, self.captured):
            return self._runs.outcome(program, inputs, self.plain)
        key = ("low", batch, inputs is batch.inputs)
        if key not in self._kept:
            self._kept[key] = self._runs.outcome(program, inputs, self.plain)
        return self._kept[key]

    def _true(self, batch: Batch, inputs: Sequence[Any]) -> Outcome | None:
        """The captured program's results in the higher precision; None where it does not run so."""
        key = ("true", batch, inputs is batch.inputs)
        if key not in self._kept and self.cannot is None:
            try:
                captured = self._at(batch, self.captured)
                self._kept[key] = self._runs.outcome(captured, inputs, self.raised)
            except CANNOT as reason:
                self.cannot = f"{type(reason).__name__}: {reason}"
        return self._kept.get(key)

    def _expected(self, batch: Batch, inputs: Sequence[Any], place: int) -> float:
        """What the error of a small result may be expected to be; see `witness`."""
        key = ("expected", batch, inputs is batch.inputs)
        if key not in self._kept:
            captured = self._at(batch, self.captured)
            self._kept[key] = expected_errors(captured, inputs, self.plain, self.raised)
        return self._kept[key][place]

    def _most(self, found: Sequence[float]) -> float:
        return self.agree(max(found, default=0.0, key=lambda d: (d != d, d)))

    def _verdict(self, done: Sequence[tuple[Batch, Found]]) -> Verdict:
        against = {f: dtype_name(self.wide) if f.own is not None else "the program before" for _, f in done}
        batch, worst = max(done, key=lambda d: (not d[1].holds, d[1].own is not None, d[1].share))
        checked = [b.label for b, _ in done]
        if self.cannot is not None:
            checked.append(f"nothing in {dtype_name(self.wide)}: {self.cannot.splitlines()[0]}")
        from_what = against[worst]
        why = sentence(batch, worst, from_what)
        return Verdict(worst.holds, worst.error, worst.allowed, worst.own, from_what, tuple(checked), why)
