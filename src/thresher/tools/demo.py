"""`thresher demo`: a real encoder, a real mixed-length batch, one line, and what it did."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import sessions
from ..report import Report
from . import models


@dataclass(frozen=True)
class Result:
    """Times are medians of interleaved rounds, in seconds a batch."""

    rows: int
    longest: int
    tokens: int
    padding: float
    eager: float
    inductor: float
    thresher: float
    compile_inductor: float
    compile_thresher: float
    difference: float
    report: dict[str, Any]

    @property
    def over_inductor(self) -> float:
        return self.inductor / self.thresher


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, run in turns so that a busy machine hurts all alike."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def run(rows: int = 16, rounds: int = 5, console: Console | None = None) -> Result:
    """Compile MiniLM with `torch.compile(model, backend="thresher")` and time it against the alternatives.

    rows: sentences in the batch, lengths long-tailed up to 256 tokens. rounds: timed turns of each candidate.
    """
    console = console or Console()
    model, tokenizer = models.minilm()
    batch = models.mixed_length_batch(tokenizer, rows, max_len=256)
    real = batch["attention_mask"].bool()
    console.print(
        f"MiniLM-L6 on {rows} passages of English: {int(real.sum())} tokens in {real.numel()} padded positions."
    )

    def timed(backend: str) -> tuple[Callable[..., Any], float]:
        compiled = torch.compile(model, backend=backend)
        with console.status(f"compiling with backend={backend!r}"):
            started = time.perf_counter()
            compiled(**batch)
        return compiled, time.perf_counter() - started

    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        inductor, compile_inductor = timed("inductor")
        torch._dynamo.reset()  # a second backend for the same forward
        with sessions.collect() as made:
            ours, compile_ours = timed("thresher")
        difference = float((ours(**batch).last_hidden_state - expected)[real].abs().max())
        inductor = torch.compile(model, backend="inductor")
        inductor(**batch)
        with console.status("measuring"):
            seconds = interleaved(
                {
                    "eager": lambda: model(**batch),
                    "inductor": lambda: inductor(**batch),
                    "thresher": lambda: ours(**batch),
                },
                rounds,
            )
    report: Report = made[0].report
    result = Result(
        rows, real.shape[1], int(real.sum()), 1 - float(real.float().mean()), seconds["eager"], seconds["inductor"],
        seconds["thresher"], compile_inductor, compile_ours, difference, report.to_dict(),
    )  # fmt: skip
    console.print(report)
    console.print(table(result))
    return result


def table(result: Result) -> Table:
    """The measurements of a run."""
    shown = Table(title=f"{result.padding:.0%} of the batch is padding", title_justify="left")
    for heading in ("run", "ms a batch", "against padded Inductor", "compile, s"):
        shown.add_column(heading, justify="left" if heading == "run" else "right")
    for name, seconds, compiling in (
        ("eager, padded", result.eager, 0.0),
        ("Inductor, padded", result.inductor, result.compile_inductor),
        ('backend="thresher"', result.thresher, result.compile_thresher),
    ):
        shown.add_row(
            name,
            f"{seconds * 1e3:.1f}",
            f"{result.inductor / seconds:.2f}x",
            f"{compiling:.1f}" if compiling else "",
        )
    bound = 1 / (1 - result.padding)
    shown.caption = (
        f"Leaving out the padding alone allows {bound:.2f}x. "
        f"Largest difference from eager at real tokens: {result.difference:.1e}."
    )
    return shown


def to_dict(result: Result) -> dict[str, Any]:
    """The result as plain data, with the gain over Inductor."""
    return {**asdict(result), "over_inductor": result.over_inductor}
