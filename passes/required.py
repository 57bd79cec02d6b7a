"""`require={"nvfp4": 0.9}`: coverage as an assertion."""

from __future__ import annotations

from thresher.errors import CoverageError
from thresher.recipe import Recipe
from thresher.report import PassReport, Report


def require(recipe: Recipe, report: Report) -> None:
    """Raise CoverageError where a pass covers less than the recipe requires."""
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
                f"require[{name!r}] is {share:.0%}, and the coverage is {account.coverage:.1%}: {len(account.rewritten)} of "
                f"{len(account.rewritten) + len(account.missed)} sites were rewritten{_bytes(account)}. "
                f"First reason: {reason}"
            )


def _bytes(account: PassReport) -> str:
    if not account.weights:
        return ""
    done, left = account.weights["rewritten"], account.weights["missed"]
    return f", {done / 1e6:.3g} of {(done + left) / 1e6:.3g} MB of weights"
