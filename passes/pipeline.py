"""Runs a recipe's passes over a Program, proves each one, and keeps the account.

Read `run` from top to bottom: order and conflicts, then per pass match, claim, rewrite, clean,
check the dialect, have the result judged, and keep it or roll it back.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from thresher.graph.dialect import verify
from thresher.graph.program import Program
from thresher.recipe import PassConfig, Recipe
from thresher.report import Miss, PassReport, Report

from . import weights
from .base import EXACT, PASSES, Context, Declined, Match, Pass
from .candidates import candidates
from .contain import Containment
from .cost.ledger import Gain, Ledger
from .cost.model import CostModel
from .order import ordered
from .proof import Judges, judged, prove, prove_whole
from .required import require
from .structure.linears import find_linears
from .structure.recover import recover

ROLLED_BACK = "The pass was rolled back."
BISECT_SECONDS = 300.0


@dataclass
class Pipeline:
    """The state of one run.

    inputs: real example inputs in the caller's layout, or None for a dry run.
    judge: measures what each pass did; None leaves every pass unverified, and the report says so.
    cost: prices what passes do; None leaves the predictions to the passes. faults: what becomes of a pass that raises.
    """

    recipe: Recipe
    inputs: Sequence[Any] | None = None
    judge: Judges | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    unverified: str = "There are no example inputs in a dry run."
    fuel: int = -1
    claimed: dict[str, str] = field(default_factory=dict)
    cost: CostModel | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    matrices: list[weights.Matrix] = field(default_factory=list)
    anchored: bool = True
    faults: Containment = field(default_factory=Containment)
    _ledger: Ledger | None = None
    _said: list[str] = field(default_factory=list)

    def run(self, program: Program) -> tuple[Program, Report]:
        """The program after all passes of the recipe, and the report of what each did and did not do.

        The program given is left as it was. Raises CoverageError where `require` is not met, ContractError for a pass that
        edits where it may only look, ArgumentError for passes that cannot be combined.
        """
        report = Report(recipe=self.recipe.fingerprint(), notes=list(program.notes))
        self.fuel, captured = self.recipe.fuel, program
        self.matrices = weights.matrices(program)
        program = self.prepare(program, report)
        for config in ordered(self.recipe):
            rewriter, before, fuel = PASSES[config.name], program, self.fuel
            if rewriter.name not in self.faults.dropped:
                with self.faults.around(rewriter, before):
                    program, account = self._apply(rewriter, config, before)
            if rewriter.name in self.faults.dropped:
                program, account, self.fuel = before, self.faults.account(rewriter.name), fuel
            report.passes.append(account)
        prove_whole(self.judge, captured, program, report)
        if self.cost is not None:
            self.cost.dense = ()
            report.predicted = self.cost.seconds(captured) / max(self.cost.seconds(program), 1e-12)
            report.notes += list(dict.fromkeys(self.cost.notes))
        require(self.recipe, report)
        return program, report

    def prepare(self, program: Program, report: Report) -> Program:
        """The program after what the recipe's passes prepare, in their order; notes about it go to the report."""
        for config in ordered(self.recipe):
            with self.faults.around(PASSES[config.name], program):
                program = self._prepare(PASSES[config.name], config, program, report)
        return program

    def _prepare(self, rewriter: Pass, config: PassConfig, before: Program, report: Report) -> Program:
        """Let a pass do early, and exactly, what it cannot do once others have run."""
        if type(rewriter).prepare is Pass.prepare:
            return before
        after = before.copy()
        context = self._context(config, after, PassReport(rewriter.name))
        made = rewriter.prepare(after, context)
        if made is None:
            return before
        after.clean()
        verify(after, after=f"the preparation of {rewriter.name}")
        if self.recipe.verify and self.judge is not None:
            verdict = self.judge.exact(before, after, EXACT.budget)
            if not verdict.holds:
                report.notes.append(
                    f"What {rewriter.name} prepares before the other passes was taken back: {verdict.why}"
                )
                return before
        self.prepared[rewriter.name] = made
        report.notes += context.notes
        return after

    def _context(self, config: PassConfig, program: Program, account: PassReport) -> Context:
        return Context(
            recipe=self.recipe,
            config=config,
            structure=functools.lru_cache(lambda: recover(program)),
            stats=self.stats,
            inputs=self.inputs,
            device=self.device,
            notes=account.notes,
            predicted=account.predicted,
            counted=account.counted,
            cost=self.cost,
            prepared=self.prepared.get(config.name),
            flops=account.flops,
        )

    def _apply(self, rewriter: Pass, config: PassConfig, before: Program) -> tuple[Program, PassReport]:
        started = time.perf_counter()
        fuel = self.fuel
        if self.cost is not None:
            self.cost.dense = self._dense_behind(config)
        after, account, claims = self._rewrite(rewriter, config, before)
        avoid: dict[str, str] = {}
        while losing := self._losing(after):
            avoid.update(losing)
            self.fuel = fuel
            after, account, claims = self._rewrite(rewriter, config, before, avoid=avoid)
        if account.rewritten:
            after.clean()
            verify(after, after=rewriter.name)
            self._prove(before, after, account)
        if account.rolled_back:
            account.guilty = self._guilty(rewriter, config, before, fuel, time.perf_counter() - started)
            if account.guilty is not None:
                account.rolled_back += f" The site that broke it is {account.guilty}."
            reason = f"{ROLLED_BACK[:-1]}: {account.rolled_back}"
            account.missed += [Miss(s, reason) for s in account.rewritten]
            account.rewritten = []
            self.fuel = fuel
        account.predicted.update({s: g.ratio for s, g in self._gains(after).items()})
        account.predicted = {s: g for s, g in account.predicted.items() if s in account.rewritten}
        if rewriter.rewrites_weights:
            self._count_weights(before, claims if account.rewritten else {}, account)
        account.seconds = time.perf_counter() - started
        if not account.rewritten:
            account.flops = {}
            account.counted = {}
            if after.calls is before.calls or account.rolled_back:
                return before, account
            return dataclasses.replace(before, calls=after.calls), account  # see `Match.of_calls`
        account.notes += self._said
        self.claimed.update(claims)
        self.anchored = self.anchored and account.exact
        return after, account

    def _count_weights(self, before: Program, claims: Mapping[str, str], account: PassReport) -> None:
        """Give every matrix that no site stands for its Miss, and count bytes."""
        sites = {s.fqn: before.weights[s.weight].origins for s in find_linears(before)[0]}
        found = weights.account(self.matrices, sites, claims, {m.site for m in account.missed})
        account.missed += found.left
        account.apart += found.apart
        account.weights = {"rewritten": found.rewritten, "missed": found.missed}

    def _rewrite(
        self,
        rewriter: Pass,
        config: PassConfig,
        before: Program,
        most: int = -1,
        avoid: Mapping[str, str] | None = None,
    ) -> tuple[Program, PassReport, dict[str, str]]:
        """Match and rewrite a copy; gives it with its account and what it claims.

        most: rewrite at most so many sites. avoid: sites to leave alone, each with the reason.
        """
        account, after, fuel = PassReport(rewriter.name), before.copy(), self.fuel
        context = self._context(config, after, account)
        account.budget, account.exact = rewriter.budget(context), rewriter.exact(context)
        claims: dict[str, str] = {}
        avoid = avoid or {}
        self._ledger = Ledger(self.cost, after) if self.cost is not None else None
        done: list[Match] = []
        found = candidates(rewriter, after, context)
        self._said = context.notes = []  # from here on they are about edits, and go with them
        for site in found:
            refused = site if isinstance(site, Miss) else self._refuse(rewriter, site)
            if refused is None and site.site in avoid:
                refused = Miss(site.site, avoid[site.site])
            if refused is None and len(account.rewritten) == most:
                break
            if refused is not None:
                account.missed.append(refused)
                continue
            assert isinstance(site, Match)
            try:
                rewriter.rewrite(after, site, context)
            except Declined as reason:  # the copy is half edited
                self.fuel = fuel
                return self._rewrite(rewriter, config, before, most, {**avoid, site.site: str(reason)})
            if site.of_calls:
                continue
            done.append(site)
            if self._ledger is not None:
                self._ledger.note(after, site.site)
            account.rewritten.append(site.site)
            claims.update(dict.fromkeys(site.claims, rewriter.name))
            self.fuel -= 1
        self._said += rewriter.about(done, context) if done else ()
        if before.packing is not None and account.rewritten:
            after.packing = dataclasses.replace(after.packing, rewritten=True)
        return after, account, claims

    def _dense_behind(self, config: PassConfig) -> tuple[str, ...]:
        """Dtypes in which passes behind this one would multiply by what it leaves."""
        passes = ordered(self.recipe)
        made = [k for c in passes[passes.index(config) + 1 :] for k in PASSES[c.name].linear_kernels(c)]
        return tuple(k.removeprefix("linear.") for k in made if k.startswith("linear."))

    def _losing(self, after: Program) -> dict[str, str]:
        """Sites of the last rewrite that are not worth it, each with the reason."""
        if self.cost is None or not self.recipe.min_gain:
            return {}
        device, least = self.cost.device, self.recipe.min_gain
        return {s: g.loss(device, least) for s, g in self._gains(after).items() if g.ratio < least}

    def _gains(self, after: Program) -> dict[str, Gain]:
        """What the cost model expects of the last rewrite, by site."""
        return self._ledger.gains(after) if self._ledger is not None else {}

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
        elif self.judge is None:
            account.unverified = self.unverified
        else:
            prove(self.judge, before, after, account, self.anchored)

    def _guilty(
        self, rewriter: Pass, config: PassConfig, before: Program, fuel: int, seconds: float
    ) -> str | None:
        """The site whose rewrite breaks the budget when sites are rewritten in order, found by halving.

        seconds: what one rewrite of the pass and its check takes; None is given where halving would take
        longer than BISECT_SECONDS.
        """
        assert self.judge is not None
        self.fuel = fuel
        sites = self._rewrite(rewriter, config, before)[1].rewritten
        if seconds * len(sites).bit_length() > BISECT_SECONDS:
            return None
        low, high = 0, len(sites)  # the first `low` sites are fine, the first `high` are not
        while high - low > 1:
            self.fuel, middle = fuel, (low + high) // 2
            after, account, _ = self._rewrite(rewriter, config, before, middle)
            after.clean()
            fine = judged(self.judge, before, after, account, self.anchored).holds
            low, high = (middle, high) if fine else (low, middle)
        return sites[high - 1]


def bisect(program: Program, recipe: Recipe, **pipeline: Any) -> str | None:
    """The FQN of the first site whose rewrite breaks its pass's budget, or None when none does."""
    _, report = Pipeline(dataclasses.replace(recipe, require=()), **pipeline).run(program)
    failed = next((p for p in report.passes if p.rolled_back), None)
    return failed.guilty if failed is not None else None
