"""What the pipeline asks of whoever measures rewrites, and what it does with the answers."""

from __future__ import annotations

from typing import Protocol

from thresher.graph.program import Program
from thresher.report import PassReport, Report
from thresher.verdict import Verdict


class Judges(Protocol):
    """Measures what rewrites did (injected: running a packed program is the runtime's job); see `runtime.judge`."""

    def exact(self, before: Program, after: Program, budget: float, anchored: bool = True) -> Verdict: ...

    def within(self, before: Program, after: Program, budget: float) -> Verdict: ...


def judged(judge: Judges, before: Program, after: Program, account: PassReport, anchored: bool) -> Verdict:
    """What is to be said of one pass. anchored: every pass kept before it was exact."""
    if account.exact:
        return judge.exact(before, after, account.budget, anchored)
    return judge.within(before, after, account.budget)


def prove(judge: Judges, before: Program, after: Program, account: PassReport, anchored: bool) -> None:
    """Judge a pass, and write it into its account."""
    verdict = judged(judge, before, after, account, anchored)
    account.error, account.own, account.budget = verdict.error, verdict.own, verdict.allowed
    account.against, account.checked = verdict.against, list(verdict.checked)
    if not verdict.holds:
        account.rolled_back = verdict.why + _remedy(account)


def prove_whole(judge: Judges | None, captured: Program, program: Program, report: Report) -> None:
    """The error of all passes together; that of a single one is known already, and so is that of exact ones, each of which
    is judged by the captured program."""
    did = [p for p in report.passes if p.rewritten]
    report.unverified = next((p.unverified for p in did if p.unverified), None)
    if report.unverified is not None:
        report.budget = sum(p.budget for p in did)
    elif len(did) < 2 or all(p.exact for p in did):
        last = did[-1] if did else PassReport("none", error=0.0)
        report.error, report.own, report.budget = last.error, last.own, last.budget
        report.against, report.checked = last.against, last.checked
    elif judge is not None:
        verdict = judge.within(captured, program, sum(p.budget for p in did))
        report.error, report.budget, report.checked = verdict.error, verdict.allowed, list(verdict.checked)
        if not verdict.holds:
            report.notes.append(
                f"Together the passes changed an output by {report.error:.2e} of its largest value, more than the "
                f"{report.budget:.0e} that their budgets sum up to, though each of them kept its own."
            )


def _remedy(account: PassReport) -> str:
    """What a user can do about a pass that was rolled back."""
    if account.exact:
        return (
            f" A rewrite that only rounds differently stays near the program's own error, so {account.name} is wrong here: "
            f"please report the model, and leave {account.name} out of the recipe until then."
        )
    return f" Give {account.name} a larger budget if the model can bear that, or leave it out of the recipe."
