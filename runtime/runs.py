"""Programs run through plain targets, batch after batch: what is lowered and copied for one is kept for the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thresher.errors import ThresherError
from thresher.graph.program import Program
from thresher.lowering.target import Target

from .compare import Comparison, Outcome, always_packed, difference, outcome, with_padding
from .fewer_rows import Untold, first_rows, with_fewer_rows
from .session import Session

# What a program raises that an operator will not run in another precision, or a batch it was not written for.
CANNOT = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, KeyError, ThresherError)


class Runs:
    """What a judge runs. Everything is kept by the program it belongs to, until `keep_only` names others."""

    def __init__(self, plain: Target):
        self.plain = plain
        self._sessions: dict[tuple[int, int], tuple[Program, Session]] = {}
        self._made: dict[tuple[int, Any], tuple[Program, Program | None]] = {}
        self._disturbed: dict[tuple[int, int], tuple[Any, list[Any]]] = {}

    def keep_only(self, *programs: Program) -> None:
        """Forget all programs but these and what was made from them."""
        kept = {id(p) for p in programs}
        self._made = {k: v for k, v in self._made.items() if k[0] in kept}
        kept |= {id(made) for _, made in self._made.values()}
        self._sessions = {k: v for k, v in self._sessions.items() if k[0] in kept}
        self._disturbed = {k: v for k, v in self._disturbed.items() if k[0] in kept}

    def outcome(self, program: Program, inputs: Sequence[Any], target: Target) -> Outcome:
        """What a program gives for the caller's inputs."""
        key = (id(program), id(target))
        found, session = outcome(program, inputs, target, self._sessions.get(key, (None, None))[1])
        self._sessions[key] = (program, session)
        return found

    def packed(self, before: Program, after: Program, inputs: Sequence[Any]) -> tuple[Program, Sequence[Any]]:
        """As `compare.as_packed`."""
        if after.packing is None or before.packing is not None:
            return after, inputs
        made = self._kept(after, "packed", lambda: always_packed(after))
        assert made is not None
        return made, with_padding(inputs, after.packing)

    def fewer(self, program: Program, rows: int, few: int) -> Program | None:
        """The program for fewer rows, or None where that cannot be told."""

        def make() -> Program | None:
            try:
                return with_fewer_rows(program, rows, few)
            except Untold:
                return None

        return self._kept(program, ("fewer", few), make)

    def unlike_with(
        self, program: Program, rows: int, few: int, inputs: Sequence[Any], whole: Outcome
    ) -> float:
        """How far a program's results for the first rows of its inputs are from those of its copy for so few."""
        copy, expected = self.fewer(program, rows, few), first_rows(whole.results, few)
        try:
            part = self.outcome(copy, first_rows(inputs, few), self.plain).results if copy is not None else []
        except CANNOT:
            return float("inf")
        if [getattr(x, "shape", None) for x in expected] != [getattr(x, "shape", None) for x in part]:
            return float("inf")
        pairs = [(e, a) for e, a in zip(expected, part) if isinstance(e, torch.Tensor) and e.numel()]
        return max((difference(e, a) for e, a in pairs), default=0.0, key=lambda d: (d != d, d))

    def comparison(self, before: Program, after: Program, inputs: Sequence[Any]) -> Comparison:
        """Which parts of the results of two programs mean the same on these inputs."""

        def run(changed: list[Any]) -> list[Any]:
            key = (id(before), id(inputs[0]))
            held = self._disturbed.get(key)
            if held is None or not _same(held[0], changed):
                held = changed, self.outcome(before, changed, self.plain).results
                self._disturbed[key] = held
            return held[1]

        return Comparison(before, after, inputs, run)

    def _kept(self, program: Program, what: Any, make: Any) -> Program | None:
        key = (id(program), what)
        if key not in self._made:
            self._made[key] = (program, make())
        return self._made[key][1]


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other))
