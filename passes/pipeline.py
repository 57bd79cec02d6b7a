"""Runs a recipe's passes over a Program, proves each one, and keeps the account.

Read `run` from top to bottom: order and conflicts, then per pass match, claim, rewrite, clean,
check the dialect, compare with the program before, and keep the result or roll it back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from thresher.dialect import verify
from thresher.errors import ArgumentError, CoverageError, ThresherError
from thresher.program import Program
from thresher.recipe import PassConfig, Recipe
from thresher.report import Miss, PassReport, Report

from .base import PASSES, Context, Match, Pass
from .structure import recover

Compare = Callable[[Program, Program, Sequence[Any]], float]
"""Largest relative difference between two programs on the same caller's inputs (injected: running
a packed program is the runtime's job)."""


@dataclass
class Pipeline:
    """The state of one run.

    inputs: real example inputs in the caller's layout, or None for a dry run.
    compare: measures before against after; None leaves every pass unverified, and the report says so.
    """

    recipe: Recipe
    inputs: Sequence[Any] | None = None
    compare: Compare | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    unverified: str = "There are no example inputs in a dry run."
    fuel: int = -1
    claimed: dict[str, str] = field(default_factory=dict)

    def run(self, program: Program) -> tuple[Program, Report]:
        report = Report(recipe=self.recipe.fingerprint(), notes=list(program.notes))
        self.fuel = self.recipe.fuel
        for config in ordered(self.recipe):
            program, account = self._apply(PASSES[config.name], config, program)
            report.passes.append(account)
        _require(self.recipe, report)
        return program, report

    def _apply(self, rewriter: Pass, config: PassConfig, before: Program) -> tuple[Program, PassReport]:
        started = time.perf_counter()
        account = PassReport(rewriter.name)
        after = before.copy()
        structure: list[Any] = []

        def view() -> Any:
            if not structure:
                structure.append(recover(after))
            return structure[0]

        context = Context(
            self.recipe, config, self.stats, self.inputs, self.device, account.notes, view, account.predicted
        )
        account.budget = rewriter.budget(context)
        claims: dict[str, str] = {}
        for site in rewriter.match(after, context):
            refused = site if isinstance(site, Miss) else self._refuse(rewriter, site)
            if refused is not None:
                account.missed.append(refused)
                continue
            assert isinstance(site, Match)
            rewriter.rewrite(after, site, context)
            account.rewritten.append(site.site)
            claims.update(dict.fromkeys(site.claims, rewriter.name))
            self.fuel -= 1
        if account.rewritten:
            after.clean()
            verify(after, after=rewriter.name)
            self._prove(before, after, account)
        account.seconds = time.perf_counter() - started
        if account.rolled_back or not account.rewritten:
            return before, account
        self.claimed.update(claims)
        return after, account

    def _refuse(self, rewriter: Pass, match: Match) -> Miss | None:
        if self.recipe.fuel >= 0 and self.fuel <= 0:
            return Miss(match.site, f"The recipe's fuel of {self.recipe.fuel} rewrites is used up.")
        for weight in match.claims:
            owner = self.claimed.get(weight)
            if owner is not None and owner not in rewriter.extends:
                return Miss(
                    match.site,
                    f"{weight} is already rewritten by {owner}, and {rewriter.name} cannot build on it.",
                )
        return None

    def _prove(self, before: Program, after: Program, account: PassReport) -> None:
        if not self.recipe.verify:
            account.unverified = "The recipe says verify=False."
        elif self.compare is None or self.inputs is None:
            account.unverified = self.unverified
        else:
            account.error = self.compare(before, after, self.inputs)
            if not account.error <= account.budget:  # NaN fails too
                account.rolled_back = (
                    f"it changed an output by {account.error:.2e} of that output's largest value, and its budget is "
                    f"{account.budget:.0e}. Bisect with the recipe's fuel to find the site."
                )
                account.missed += [Miss(s, "The pass was rolled back.") for s in account.rewritten]
                account.rewritten = []


def ordered(recipe: Recipe) -> list[PassConfig]:
    """The recipe's passes in their declared order; raises when two cannot be combined."""
    names = [c.name for c in recipe.passes]
    for name in names:
        if name not in PASSES:
            raise ArgumentError(
                "recipe", repr(name), f"one of {', '.join(sorted(PASSES))}", "Import the module that has it."
            )
        for other, reason in PASSES[name].conflicts.items():
            if other in names:
                raise ArgumentError("recipe", f"{name} with {other}", "passes that can be combined", reason)
    return sorted(recipe.passes, key=lambda c: PASSES[c.name].order)


def _require(recipe: Recipe, report: Report) -> None:
    for name, share in recipe.require:
        try:
            account = report[name]
        except KeyError:
            raise CoverageError(
                f"require[{name!r}] is {share:.0%}, but the recipe does not run {name}."
            ) from None
        if account.coverage < share or (not account.rewritten and share > 0):
            reason = account.missed[0].reason if account.missed else "There is no candidate site."
            raise CoverageError(
                f"require[{name!r}] is {share:.0%}; {len(account.rewritten)} of "
                f"{len(account.rewritten) + len(account.missed)} sites were rewritten. First reason: {reason}"
            )


def bisect(program: Program, recipe: Recipe, **pipeline: Any) -> str | None:
    """The FQN of the first site whose rewrite breaks its pass's budget, or None when none does.

    Runs the pipeline with growing fuel by halving; raises when the recipe cannot run at all.
    """
    import dataclasses

    def broken(fuel: int) -> tuple[bool, list[str]]:
        _, report = Pipeline(dataclasses.replace(recipe, fuel=fuel, require=()), **pipeline).run(program)
        bad = any(p.rolled_back for p in report.passes)
        sites = [
            m.site
            for p in report.passes
            if p.rolled_back
            for m in p.missed
            if m.reason == "The pass was rolled back."
        ]
        return bad, sites

    total, report = 0, Pipeline(dataclasses.replace(recipe, fuel=-1, require=()), **pipeline).run(program)[1]
    total = sum(
        len(p.rewritten) + sum(m.reason == "The pass was rolled back." for m in p.missed)
        for p in report.passes
    )
    if not any(p.rolled_back for p in report.passes):
        return None
    low, high = 0, total  # low is fine, high is broken
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if broken(middle)[0] else (middle, high)
    sites = broken(high)[1]
    if not sites:
        raise ThresherError("The failing site changes with the number of rewrites; it cannot be bisected.")
    return sites[-1]
