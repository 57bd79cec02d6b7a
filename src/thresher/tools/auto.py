"""`recipe="auto"`: tries recipes on the user's own model and data and keeps the fastest that is accurate enough.

    found = thresher.find_recipe(model, batch, budget=0.01, output="mine.toml", state="mine.json")
    fast = thresher.compile(model, batch, found.recipe)

Each candidate is judged twice: its accuracy through the reference target, which builds nothing, and, when
that is within the budget, its speed on the real target, beside the model as it is. What was measured is
written to the state file after every candidate, so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thresher.runtime.call_session import CallSession

from .. import backend, option_types
from ..errors import ArgumentError, ThresherError, unknown_key
from ..files import check_writable
from ..progress import progress
from ..recipe import PRESETS, Recipe
from ..strict import compile_strictly
from . import bench

assert backend  # registers the passes
FORMAT = "thresher-auto-1"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
METRICS = ("kl", "perplexity", "cosine")
Metric = Callable[[Callable[..., Any]], float]


@dataclass
class Tried:
    """One candidate. loss: by how much the metric is worse than the model's own. gain: speed over the model as it
    is on the target; None when it was not timed. expected: by the cost model. reason: why it was not taken.
    program: names what the recipe made of the model. like: a candidate that made the same, which was timed for both."""

    name: str
    fingerprint: str
    loss: float | None = None
    gain: float | None = None
    expected: float | None = None
    reason: str | None = None
    seconds: float = 0.0
    program: str | None = None
    like: str | None = None


@dataclass
class Candidate:
    """The fastest recipe within the budget; the model as it is when nothing was faster. rows: all that was tried."""

    recipe: Recipe
    name: str
    gain: float
    loss: float
    rows: list[Tried] = field(default_factory=list)

    def __rich__(self) -> Table:
        table = Table(title=f"auto chose {self.name}", title_justify="left")
        for heading in ("recipe", "loss", "expected", "measured", "why not"):
            table.add_column(heading, overflow="fold")
        for r in self.rows:
            loss, expected, gain = (("" if v is None else f"{v:.3g}") for v in (r.loss, r.expected, r.gain))
            gain += f" (the same program as {r.like})" if r.like else ""
            # escaped: reasons speak of [batch, sequence]
            table.add_row(*map(escape, (r.name, loss, expected, gain, r.reason or "")))
        return table

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def candidates(stats: str | None = None) -> dict[str, Recipe]:
    """The presets, and each form of linears on top of the exact rewrites. stats: of RSQ, tried too when given."""
    found = {n: Recipe.of(n) for n in PRESETS} | {"exact + bf16": Recipe.of("exact", bf16=True, min_gain=1.0)}
    for mode in ("exact", "int16", "int8"):
        found[f"exact + nvfp4 {mode}"] = Recipe.of("exact", nvfp4={"activations": mode}, min_gain=1.0)
    if stats is not None:
        found["exact + rsq"] = Recipe.of("exact", rsq=True, stats=stats)
        found["rsq"] = Recipe.of({"rsq": True, "stats": stats})
    return found


def find_recipe(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    budget: float = 0.01,
    metric: str | Metric | None = None,
    recipes: Mapping[str, Any] | None = None,
    stats: str | None = None,
    target: str = "inductor",
    rounds: int = 5,
    state: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Candidate:
    """Search the fastest recipe whose loss is within the budget.

    budget: largest accepted loss, in the metric's unit.
    metric: "kl" (mean KL divergence of next-token distributions from the model's, nats), "perplexity" (relative
        increase on the example's own tokens), "cosine" (one less the mean cosine of hidden states), all at real
        tokens; or a function that is given something to call as the model and returns a score, higher being
        better: then the loss is the relative drop. None: "kl" for a model with logits, else "cosine".
    recipes: name -> anything `Recipe.of` takes, to try instead of `candidates(stats)`.
    state: file in which measurements are kept; a search over the same model, example and target goes on from it.
    output: where the chosen recipe is written as TOML.
    """
    if isinstance(budget, str) or not budget >= 0:
        raise ArgumentError("budget", repr(budget), "a number, 0 or more", "0.01 is one percent.")
    if recipes is not None and not recipes:
        raise ArgumentError("recipes", "{}", "at least one recipe by name", "Leave it out for the presets.")
    for name, path in (("state", state), ("output", output)):  # hours before they are written
        check_writable(name, None if path is None else Path(path))
    judge = _metric(metric, model, example_inputs)
    given = {n: Recipe.of(r) for n, r in recipes.items()} if recipes is not None else candidates(stats)
    kept = _State(state, _key(model, example_inputs, metric, target))
    for name, recipe in progress(given.items(), "searching recipes", len(given)):
        tried = kept.rows.get(recipe.fingerprint())
        if tried is None:
            started = time.perf_counter()
            tried = _judge(model, example_inputs, name, recipe, judge)
        elif tried.gain is not None:
            continue
        else:
            started = time.perf_counter() - tried.seconds  # the budget may have been smaller before
        if tried.reason is None and tried.loss is not None and tried.loss <= budget:
            same = (r for r in kept.rows.values() if r.gain is not None and r.program == tried.program)
            timed = next(same, None) if tried.program is not None else None
            if timed is not None:
                tried.gain, tried.like = timed.gain, timed.like or timed.name
            else:
                tried.gain = _time(model, example_inputs, recipe, target, rounds)
        tried.seconds = time.perf_counter() - started
        kept.add(tried)
    rows = [kept.rows[r.fingerprint()] for r in given.values()]
    found = _choose(rows, given, budget)
    if output is not None:
        _write(
            Path(output),
            f"# {found.name}: {found.gain:.2f}x, loss {found.loss:.2g}\n{found.recipe.to_toml(Path(output).parent)}",
        )
    return found


def _choose(rows: list[Tried], given: Mapping[str, Recipe], budget: float) -> Candidate:
    for row in rows:
        if row.reason is None and row.loss is not None and not row.loss <= budget:
            row.reason = f"Its loss of {row.loss:.3g} is above the budget of {budget:g}."
    fit = [r for r in rows if r.gain is not None and r.loss is not None and r.loss <= budget and not r.reason]
    best = max(fit, key=lambda r: r.gain or 0.0, default=None)
    if best is None or (best.gain or 0.0) < 1.0:
        return Candidate(Recipe.of("none"), "none", 1.0, 0.0, rows)
    recipe = next(r for r in given.values() if r.fingerprint() == best.fingerprint)
    return Candidate(recipe, best.name, best.gain or 1.0, best.loss or 0.0, rows)


def _judge(model: Any, inputs: Any, name: str, recipe: Recipe, judge: Callable[[Any], float]) -> Tried:
    tried = Tried(name, recipe.fingerprint())
    try:
        compiled = compile_strictly(model, inputs, recipe, target="reference", may_do_nothing=True)
        tried.expected, tried.program = compiled.report.predicted, _program(compiled)
        tried.loss = judge(compiled)
        if recipe.passes and not compiled.report.rewritten:
            first = next(
                (m.reason for p in compiled.report.passes for m in p.missed), "No pass found a site."
            )
            tried.reason = f"It rewrites nothing: {first}"
        if tried.loss != tried.loss:
            tried.reason, tried.loss = "Its results are not numbers.", None
    except ThresherError as refused:
        tried.reason = str(refused)
    return tried


def _program(compiled: Any) -> str | None:
    """Names what is timed of a compiled model; None where each call decides what runs. Weights' values do not matter."""
    if any(isinstance(s, CallSession) for s in compiled.sessions):
        return None
    made = [
        (p.fingerprint(), p.packing and p.packing.packing) for p in (s.program for s in compiled.sessions)
    ]
    decided = repr((made, compiled.recipe.freshness, compiled.recipe.inductor))
    return hashlib.sha256(decided.encode()).hexdigest()[:16]


def _time(model: Any, inputs: Any, recipe: Recipe, target: str, rounds: int) -> float:
    timed, _ = bench.compare(model, inputs, {"candidate": recipe}, target=target, rounds=rounds)
    by_name = {t.name: t.seconds for t in timed}
    return by_name.get("inductor", by_name["eager"]) / by_name["candidate"]


def _metric(metric: str | Metric | None, model: Any, inputs: Mapping[str, Any]) -> Callable[[Any], float]:
    with torch.no_grad():
        own = model(**inputs)
    logits = getattr(own, "logits", None)
    if callable(metric):
        score, base = metric, float(metric(model))
        return lambda candidate: (base - float(score(candidate))) / max(abs(base), 1e-12)
    if metric is None:
        metric = "kl" if isinstance(logits, torch.Tensor) and logits.dim() == 3 else "cosine"
    if metric not in METRICS:
        raise unknown_key("metric", str(metric), METRICS)
    if metric != "cosine" and not isinstance(logits, torch.Tensor):
        raise ArgumentError("metric", repr(metric), "'cosine' or a function for a model without logits",
                            "Use metric='cosine', or pass a function that scores the model.")  # fmt: skip
    reference = bench.first_tensor(own).float()
    mask = inputs.get("attention_mask")
    real = mask.bool() if mask is not None else torch.ones(reference.shape[:2], dtype=torch.bool)

    def loss(candidate: Callable[..., Any]) -> float:
        result = bench.first_tensor(candidate(**inputs)).float()
        if metric == "cosine":
            close = torch.nn.functional.cosine_similarity(reference[real], result[real], dim=-1)
            return float(1 - close.mean())
        p, q = (t[real].log_softmax(-1) for t in (reference, result))
        if metric == "kl":
            return float((p.exp() * (p - q)).sum(-1).mean())
        return (
            _perplexity(result, inputs["input_ids"], real) / _perplexity(reference, inputs["input_ids"], real)
            - 1
        )

    return loss


def _perplexity(logits: torch.Tensor, ids: torch.Tensor, real: torch.Tensor) -> float:
    both = real[:, 1:] & real[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits[:, :-1][both], ids[:, 1:][both]).exp())


class _State:
    """Measurements by recipe fingerprint, in a file that is whole or not there."""

    def __init__(self, path: str | os.PathLike[str] | None, key: str):
        self.path, self.key = None if path is None else Path(path), key
        self.rows: dict[str, Tried] = {}
        if self.path is not None and self.path.exists():
            try:
                found = json.loads(self.path.read_text())
                if found["format"] != FORMAT:
                    raise ValueError(f"its format is {found['format']!r}")
                if found["key"] == key:
                    self.rows = {k: _row(k, v) for k, v in found["rows"].items()}
            except _UNREADABLE as reason:
                raise ArgumentError("state", f"{self.path} ({reason})", "a file written by a search",
                                    "Name another file, or delete this one.") from None  # fmt: skip

    def add(self, tried: Tried) -> None:
        self.rows[tried.fingerprint] = tried
        if self.path is not None:
            rows = {k: asdict(v) for k, v in self.rows.items()}
            _write(self.path, json.dumps({"format": FORMAT, "key": self.key, "rows": rows}, indent=1))


def _row(fingerprint: str, given: Mapping[str, Any]) -> Tried:
    """One row of a state file. Raises ValueError, TypeError or OverflowError for what no search has written."""
    row = Tried(**given)
    option_types.check("row", row)
    numbers = [float(n) for n in (row.loss, row.gain, row.expected, row.seconds) if n is not None]
    gained = row.gain is None or row.gain > 0
    if row.fingerprint != fingerprint or not gained or any(n != n for n in numbers):
        raise ValueError(f"its row {fingerprint} holds {row}")
    return row


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _key(model: torch.nn.Module, inputs: Mapping[str, Any], metric: Any, target: str) -> str:
    """Names what was measured: weights, example, metric, target, threads."""
    digest = hashlib.sha256()
    for name, tensor in [*model.state_dict().items(), *inputs.items()]:
        if isinstance(tensor, torch.Tensor):
            flat = tensor.detach().flatten()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(flat[:: max(1, flat.numel() // 64)][:64].double().cpu().numpy().tobytes())
    named = (
        metric if isinstance(metric, str) or metric is None else getattr(metric, "__qualname__", "function")
    )
    digest.update(f"{named} {target} {torch.get_num_threads()} {torch.__version__}".encode())
    return digest.hexdigest()[:16]
