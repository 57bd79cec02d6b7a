"""The part `auto` of compose.py: a whole search with recipe="auto" on MiniLM and the real target, stopped and resumed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, alone, interleave

import thresher
from thresher.tools import models
from thresher.tools.auto import candidates

BUDGET = 0.01


class _Stopped(Exception):
    pass


def search(b: Benchmark, args: Any) -> None:
    """Search, stopped after two candidates, go on in the state file, and time the winner beside every preset again.

    Recipes that make the same program of the model are one form: timing it twice would measure the machine.
    """
    model, tokenizer = models.minilm()
    batch = models.mixed_length_batch(tokenizer, 8, max_len=64 if args.quick else 128)
    given = candidates()
    if args.quick:
        given = {n: given[n] for n in ("none", "exact", "embed")}
    with tempfile.TemporaryDirectory() as directory:
        state = Path(args.state or Path(directory) / "search.json")
        options = {"budget": BUDGET, "recipes": given, "state": state, "rounds": 5}
        _stop_after(2, model, batch, options)
        kept = state.read_text().count('"fingerprint"')
        found = thresher.find_recipe(model, batch, output=Path(directory) / "chosen.toml", **options)
        again = thresher.Recipe.of(Path(directory) / "chosen.toml")
    assert again == found.recipe
    for row in found.rows:
        b.row(part="auto", form=row.name, loss=row.loss, predicted=row.expected, gain=row.gain,
              like=row.like, seconds=round(row.seconds, 1), reason=row.reason)  # fmt: skip
    b.row(part="auto", form=f"chosen: {found.name}", gain=found.gain, loss=found.loss, kept_when_stopped=kept)
    calls = {}
    for row in found.rows:
        if row.gain is not None and row.like is None:
            compiled = thresher.compile(model, batch, given[row.name])
            calls[row.name] = lambda c=compiled: c(**batch)
    with torch.no_grad(), alone(args.lock):
        times = {n: t.cpu_min for n, t in interleave(calls, rounds=4 if args.quick else 9).items()}
    for name, least in times.items():
        b.row(part="auto", form=f"{name}, timed again", cpu_min_ms=round(least, 2))
    like = {r.name: r.like for r in found.rows}.get(found.name)
    chosen = like or (found.name if found.name in times else "none")
    b.claim(
        "MiniLM: what recipe='auto' found, over the fastest preset within 1 %, timed again",
        times[chosen] / min(times.values()),
        "<= 1.03",
    )


def _stop_after(count: int, model: Any, batch: Any, options: dict[str, Any]) -> None:
    """A search that is stopped, as by Ctrl-C, when so many candidates were measured."""
    from thresher.tools import auto

    judge, seen = auto._judge, []

    def stopping(*given: Any) -> Any:
        if len(seen) == count:
            raise _Stopped
        seen.append(given)
        return judge(*given)

    auto._judge = stopping
    try:
        thresher.find_recipe(model, batch, **options)
    except _Stopped:
        pass
    finally:
        auto._judge = judge
