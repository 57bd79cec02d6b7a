"""Why a recipe did nothing to a model, in the words of its passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .report import PassReport, Report

WHOLE = "the whole program"  # the site of a miss that is of no part of a graph
FEEDING = "the graph that puts image features in"  # a site of token passes


def rewrote_nothing(reports: Sequence[Report]) -> str | None:
    """A sentence for each pass that says why it rewrote nothing, where no pass of any graph did; else None.

    A graph that only tells the next one which tokens are an image's has done nothing by itself.
    """
    done = any(site != FEEDING for r in reports for p in r.passes for site in p.rewritten)
    if done or not any(r.passes for r in reports):
        return None
    names = dict.fromkeys(p.name for r in reports for p in r.passes)
    return " ".join(f"{name}: {why([r[name] for r in reports if _has(r, name)])}" for name in names)


def why(accounts: Sequence[PassReport]) -> str:
    """Why one pass rewrote nothing in these graphs: what broke its budget, else what most sites say."""
    for account in accounts:
        if account.rolled_back:
            return f"It was rolled back: {account.rolled_back}"
    reasons = Counter(m.reason for a in accounts for m in a.missed)
    whole = {m.reason for a in accounts for m in a.missed if m.site == WHOLE}
    if len(accounts) > 1 and reasons and whole.issuperset(reasons):  # of a graph, which is not the model
        told = " ".join(f"{n} of them: {r}" for r, n in reasons.most_common(2))
        return f"None of {len(accounts)} graphs, each looked at alone, has all it needs. {told}"
    return reasons.most_common(1)[0][0] if reasons else "It found no candidate site."


def _has(report: Report, name: str) -> bool:
    return any(p.name == name for p in report.passes)
