"""Times a compiled model against the model as it was, in turns, and writes the gain into its certificate."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from thresher.lowering import catalog as targets

from ..compat import isolated
from ..compiled import Compiled
from ..errors import ArgumentError
from ..progress import progress
from ..recipe import Recipe
from ..strict import compile_strictly


@dataclass(frozen=True)
class Timed:
    """name: "eager", "inductor" or the recipe's. seconds: median of the rounds, for one call. compile_seconds: of
    the first call. difference: largest difference from eager at real tokens, relative to the largest value."""

    name: str
    seconds: float
    compile_seconds: float
    difference: float


def in_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, run in turns so that a busy machine hurts all alike.

    On one thread its CPU time counts, which other programs disturb less; else the clock on the wall.
    """
    clock = (
        time.thread_time
        if torch.get_num_threads() == 1 and not torch.cuda.is_available()
        else time.perf_counter
    )
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(max(1, rounds)):
        for name, call in candidates.items():
            _wait()
            started = clock()
            call()
            _wait()
            taken[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any],
    recipes: Mapping[str, Any],
    *,
    target: str = "inductor",
    rounds: int = 5,
) -> tuple[list[Timed], dict[str, Compiled]]:
    """Time eager, what runs on the target without Thresher (Inductor) and each recipe on one batch, in one run.

    recipes: name -> anything `Recipe.of` takes. Fills each certificate's and report's `measured`.
    """
    if not recipes:
        raise ArgumentError("recipes", "{}", "at least one recipe by name", "Name a preset, such as 'exact'.")
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(**example_inputs)}
    built: dict[str, float] = {"eager": 0.0}
    made: dict[str, Compiled] = {}
    with torch.no_grad():
        expected = model(**example_inputs)
        peer = targets.runtime(target, lowers=True).peer
        if peer is not None:
            plain = torch.compile(model, backend=peer, **isolated())
            built[peer] = _first(lambda: plain(**example_inputs))
            calls[peer] = lambda: plain(**example_inputs)
        for name, spec in progress(recipes.items(), "compiling", len(recipes)):
            started = time.perf_counter()
            made[name] = compile_strictly(
                model, example_inputs, Recipe.of(spec), target=target, may_do_nothing=True
            )
            built[name] = time.perf_counter() - started
            calls[name] = lambda name=name: made[name](**example_inputs)  # type: ignore[misc]
        named = (compiled.recipe.mask_name for compiled in made.values())
        mask = next((example_inputs[n] for n in named if n in example_inputs), None)
        differences = {n: difference(expected, call(), mask) for n, call in calls.items()}
        seconds = in_turns(calls, rounds)
    baseline = seconds[peer or "eager"]
    for name, compiled in made.items():
        _record(compiled, baseline / seconds[name])
    return [Timed(n, seconds[n], built[n], differences[n]) for n in calls], made


def table(
    title: str,
    timed: Sequence[Timed],
    gains: Mapping[str, float],
    expected: Mapping[str, float | None],
    baseline: str,
) -> Table:
    """What `compare` measured. gains: speed over the baseline; expected: the same by the cost model, of recipes."""
    shown = Table(title=title, title_justify="left")
    for heading in ("run", "ms", f"over {baseline}", "expected", "max rel. difference", "compile, s"):
        shown.add_column(heading, justify="left" if heading == "run" else "right")
    for t in timed:
        guess = expected.get(t.name)
        shown.add_row(t.name, f"{t.seconds * 1e3:.1f}", f"{gains[t.name]:.2f}x", f"{guess:.2f}x" if guess else "",
                      f"{t.difference:.1e}", f"{t.compile_seconds:.1f}")  # fmt: skip
    return shown


def _first(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _record(compiled: Compiled, gain: float) -> None:
    for session in compiled.sessions:
        session.report.measured = gain
        session.certificate = dataclasses.replace(session.certificate, measured=gain)


def difference(expected: Any, actual: Any, mask: torch.Tensor | None) -> float:
    """Largest difference of the first result, relative to its largest value; pads left out where a mask names them.
    NaN where exactly one of the two is finite."""
    e, a = first_tensor(expected).double(), first_tensor(actual).double()
    if mask is not None and e.dim() >= 2 and tuple(e.shape[:2]) == tuple(mask.shape):
        e, a = e[mask != 0], a[mask != 0]
    if not torch.equal(e.isfinite(), a.isfinite()):
        return float("nan")
    known = e.isfinite()
    if not known.any():
        return 0.0
    return float((e - a)[known].abs().max() / e[known].abs().max().clamp_min(1e-30))


def first_tensor(result: Any) -> torch.Tensor:
    """The result's main tensor: logits or hidden states of a Hugging Face model, else the first there is."""
    if isinstance(result, torch.Tensor):
        return result
    for name in ("logits", "last_hidden_state"):
        found = getattr(result, name, None)
        if isinstance(found, torch.Tensor):
            return found
    values: Sequence[Any] = list(result.values()) if isinstance(result, Mapping) else list(result)
    return first_tensor(values[0])
