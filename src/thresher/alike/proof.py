"""Passes that are exact are judged on a program of few layers, where all layers are alike, and then applied to all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from thresher.passes.base import PASSES

from ..graph.program import Program
from ..recipe import Recipe
from ..report import Report

Run = Callable[[Program, Recipe, Sequence[Any] | None], tuple[Program, Report]]


def proven_on_few(
    run: Run,
    short: Program,
    few: Sequence[Any] | None,
    program: Program,
    inputs: Sequence[Any] | None,
    recipe: Recipe,
) -> tuple[Program, Report]:
    """Rewrite a program; where `short` is one of its first layers only, judge the passes there.

    run: rewrites a program and judges its passes on inputs. few, inputs: of either program. What a pass that only rounds
    otherwise does to one layer it does to all that are like it. A pass that fails, or does something else to the whole
    program, is judged on the whole.
    """
    exact = all(PASSES[c.name].effect.exact for c in recipe.passes)
    if short is program or few is None or not recipe.verify or not exact:
        return run(program, recipe, inputs)
    _, proof = run(short, dataclasses.replace(recipe, require=()), few)
    if any(p.rolled_back or p.dropped or p.unverified for p in proof.passes):
        return run(program, recipe, inputs)
    rewritten, report = run(program, dataclasses.replace(recipe, verify=False), inputs)
    kinds = [bool(p.rewritten) for p in report.passes]
    if kinds != [bool(p.rewritten) for p in proof.passes] or any(p.dropped for p in report.passes):
        return run(program, recipe, inputs)
    said = "with three layers, which all others are like"
    accounts: list[Any] = [report, *report.passes]
    proofs: list[Any] = [proof, *proof.passes]
    for account, known in zip(accounts, proofs):
        account.error, account.own, account.budget = known.error, known.own, known.budget
        account.against, account.unverified = known.against, known.unverified
        account.checked = [f"{label}, {said}" for label in known.checked]
    report.recipe = recipe.fingerprint()
    return rewritten, report
