"""What was done and what was not, and why: as a table, as JSON, and in torch's structured trace."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from . import option_types, site_counts
from .compat import trace_structured_json
from .engine_report import EngineReport, known_fields
from .gains import speed
from .op_checks import OpCheck

_WIDE = 120
"""Columns of text that a report has where it is not printed to a terminal."""


@dataclass(frozen=True)
class Miss:
    """A site that could have been rewritten and was not.

    site: FQN of the module, or a sentence's subject such as "the whole program".
    reason: one full sentence, with the value that decided.
    """

    site: str
    reason: str


@dataclass
class PassReport:
    """One pass: the sites it rewrote, those it did not with the reasons, and the error it caused.

    exact: whether the pass promises to change nothing but rounding.
    error: largest difference of any output `against` what the pass was judged by, relative to that output's largest value;
        None when it was not measured, and then `unverified` says why.
    against: "float32" or "float64", a run of the captured program in that precision, or "the program before".
    own: the captured program's own error there, which an exact pass is judged by; None where none was measured.
    budget: what `error` may be: of an exact pass 1.5 times `own` and a floor, else what the pass declared.
    checked: the batches it was judged on, in words.
    predicted, measured: time before over time after for each rewritten site, by the cost model and by the
        clock; empty without.
    guilty: the site whose rewrite broke the budget of a pass that was rolled back.
    counted: site -> the name its operator counts under, for passes whose sites choose at each call.
    dropped: why the pass was left out: it raised, or broke its contract.
    flops: what the layers compute "before" and "after" the pass on the example; empty for most passes.
    weights: bytes of the matrices that products multiply by, "rewritten" and "missed"; empty for passes that are not
        about weights. apart: the matrices that no product multiplies by, such as tables that are looked up.
    """

    name: str
    rewritten: list[str] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    error: float | None = None
    budget: float = 0.0
    unverified: str | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    rolled_back: str | None = None
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    guilty: str | None = None
    counted: dict[str, str] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    apart: list[Miss] = field(default_factory=list)
    exact: bool = True
    own: float | None = None
    against: str = "the program before"
    checked: list[str] = field(default_factory=list)
    dropped: str | None = None

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], strict: bool = False) -> PassReport:
        """What asdict wrote. strict: TypeError for what this version does not know, which else is left out, and
        ArgumentError for a value of another type than its field's."""
        known = dict(given) if strict else known_fields(cls, given)
        misses = {name: [Miss(**m) for m in given.get(name, ())] for name in ("missed", "apart")}
        if known.get("budget", 0.0) is None:  # JSON has no infinity
            known["budget"] = float("inf")
        made = cls(**{**known, **misses})
        if strict:
            for part in (made, *made.missed, *made.apart):
                option_types.check("a pass's", part)
        return made

    @property
    def flops_left(self) -> float | None:
        """The share of the layers' FLOPs that is left on the example; None where the pass did not say."""
        return self.flops["after"] / self.flops["before"] if self.flops else None

    @property
    def sentences(self) -> list[str]:
        """What there is to say beside the sites."""
        left = self.flops_left
        said = [] if left is None else [f"{left:.0%} of the layers' FLOPs are left on the example."]
        if self.own is not None and self.error is not None:
            said.append(
                f"Its error to a run in {self.against} is {self.error:.1e}, the model's own {self.own:.1e}; checked on "
                f"{len(self.checked)} batches: {'; '.join(self.checked)}."
            )
        return self.notes + said

    @property
    def activity(self) -> dict[str, dict[str, Any]]:
        """What the sites chose so far: calls sparse and dense, and the mean share of neurons on, by site.

        union_density counts a neuron that was on for any token of a call; None before the first such call.
        """
        found = {}
        for name, key in self.counted.items():
            count = site_counts.site(key)
            found[name] = {"sparse": count.sparse, "dense": count.dense, "union_density": count.union_density}
        return found

    @property
    def shown_error(self) -> str:
        return "not measured" if self.error is None else f"{self.error:.1e}"

    @property
    def shown_own(self) -> str:
        return "" if self.own is None else f"{self.own:.1e}"

    @property
    def coverage(self) -> float:
        """The share that was rewritten: of the bytes of weights, for passes about weights, else of the candidate sites.

        1.0 when there was nothing to rewrite.
        """
        if self.weights:
            total = sum(self.weights.values())
            return self.weights["rewritten"] / total if total else 1.0
        total = len(self.rewritten) + len(self.missed)
        return len(self.rewritten) / total if total else 1.0


@dataclass
class Report:
    """Everything said about one compiled program.

    error, own, against, budget, checked, unverified: as in PassReport, for all passes together. With a pass among them that
        is not exact, the error is from the captured program, and the budget the sum of theirs.
    predicted, measured: time before over time after, by the cost model and by the clock; None without.
    operators: each operator of ours that ran while the passes were verified, against its reference on the example.
    engines: what a target built for a GPU to run parts of the program.
    phases: seconds that compiling took, by phase (`phases`): "trace", "capture", "passes", "verification", "lowering". A
        program that waits for its first call has its lowering added then.
    """

    recipe: str
    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    target: str = "none"
    error: float | None = None
    budget: float = 0.0
    unverified: str | None = None
    predicted: float | None = None
    measured: float | None = None
    operators: dict[str, OpCheck] = field(default_factory=dict)
    own: float | None = None
    against: str = "the program before"
    checked: list[str] = field(default_factory=list)
    engines: list[EngineReport] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict, compare=False)

    def __getitem__(self, name: str) -> PassReport:
        return {p.name: p for p in reversed(self.passes)}[name]

    @property
    def rewritten(self) -> int:
        return sum(len(p.rewritten) for p in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, with what the sites chose so far beside each pass."""
        found = asdict(self)
        for account, p in zip(found["passes"], self.passes):
            account["activity"] = p.activity
        return found

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote; what this version does not know is left out."""
        passes = [PassReport.from_dict(p) for p in given["passes"]]
        checks = given.get("operators", {}).items()
        operators = {name: OpCheck(**known_fields(OpCheck, check)) for name, check in checks}
        engines = [EngineReport(**known_fields(EngineReport, e)) for e in given.get("engines", ())]
        seconds = {str(name): float(spent) for name, spent in given.get("phases", {}).items()}
        own = {"passes": passes, "operators": operators, "engines": engines, "phases": seconds}
        return cls(**{**known_fields(cls, given), **own})

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def emit_trace(self) -> None:
        """Attach the report to torch's structured trace (tlparse shows it as an artifact)."""
        trace_structured_json("thresher_report", self.to_json())

    def summary(self) -> str:
        """One line."""
        if not self.passes:
            return "thresher: the recipe has no passes; the model runs as plain Inductor compiles it."
        counts = [(p.name, len(p.rewritten), len(p.rewritten) + len(p.missed)) for p in self.passes]
        parts = [f"{name} rewrote {done} of {all} sites" for name, done, all in counts]
        return "thresher: " + "; ".join(parts) + "."

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        overview = self._table()
        if console.measure(overview, options=options.update(max_width=_WIDE)).maximum > options.max_width:
            yield from self._lines()  # a table as narrow would cut its numbers
        else:
            yield overview
        if self.predicted is not None:
            measured = "" if self.measured is None else f", and {self.measured:.2f}x was measured"
            yield Text(f"The cost model expects {self.predicted:.2f}x for the whole program{measured}.")
        yield from (line for p in self.passes for line in _details(p))
        if self.phases:
            yield Text(f"compiled in {', '.join(f'{n} {s:.1f} s' for n, s in self.phases.items())}")
        yield from [Text(f"engine {e}") for e in self.engines]
        yield from [Text(f"note: {n}") for n in self.notes]

    def _table(self) -> Table:
        overview = Table(title="Thresher report", title_justify="left", expand=False)
        for heading, align in [("pass", "left"), ("rewritten", "right"), ("missed", "right"), ("max rel. error", "right"),
                               ("model's own", "right"), ("budget", "right"), ("expected", "right"), ("measured", "right"),
                               ("seconds", "right")]:  # fmt: skip
            overview.add_column(heading, justify=align)  # type: ignore[arg-type]
        for p in self.passes:
            counts = str(len(p.rewritten)), str(len(p.missed))
            gains = speed(p.predicted), speed(p.measured)
            overview.add_row(
                p.name, *counts, p.shown_error, p.shown_own, f"{p.budget:.0e}", *gains, f"{p.seconds:.1f}"
            )
        return overview

    def _lines(self) -> Iterator[Text]:
        """What the table says, a pass a line."""
        yield Text("Thresher report", style="italic")
        for p in self.passes:
            own = f" (the model's own {p.shown_own})" if p.shown_own else ""
            gains = (f", {word} {speed(found)}" for word, found in (("expected", p.predicted), ("measured", p.measured))
                     if speed(found))  # fmt: skip
            counts = f"{len(p.rewritten)} rewritten, {len(p.missed)} missed"
            yield Text(f"{p.name}: {counts}; max rel. error {p.shown_error}{own}, budget {p.budget:.0e}{''.join(gains)}; "
                       f"{p.seconds:.1f} s")  # fmt: skip

    def __str__(self) -> str:
        console = Console(width=_WIDE, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _details(p: PassReport) -> list[Any]:
    lines: list[Any] = []
    if p.rewritten:
        lines.append(Text(f"{p.name} rewrote: {_fold(p.rewritten)}"))
    for reason, count in Counter(m.reason for m in p.missed).most_common():
        sites = [m.site for m in p.missed if m.reason == reason]
        lines.append(Text(f"{p.name} left alone {_fold(sites)} ({count}): {reason}", style="yellow"))
    if p.weights:
        done, left = p.weights["rewritten"], p.weights["missed"]
        share = f"{p.coverage:.1%} of the bytes of weights ({done / 1e6:.3g} of {(done + left) / 1e6:.3g} MB)"
        tables = (
            f"; not counted, as no matrix product reads them: {_fold([m.site for m in p.apart])}"
            if p.apart
            else ""
        )
        lines.append(Text(f"{p.name} covers {share}{tables}."))
    lines += [Text(f"{p.name}: {sentence}") for sentence in p.sentences]
    lines += [
        Text(f"{p.name} ran {site}: {_ran(found)}")
        for site, found in p.activity.items()
        if any(found.values())
    ]
    if p.dropped:
        lines.append(Text(f"{p.name} was left out: {p.dropped}", style="red"))
    if p.rolled_back:
        lines.append(Text(f"{p.name} was rolled back: {p.rolled_back}", style="red"))
    if p.unverified:
        lines.append(Text(f"{p.name} was not verified: {p.unverified}"))
    return lines


def _ran(found: dict[str, Any]) -> str:
    density = found["union_density"]
    share = "" if density is None else f", {density:.1%} of the neurons on for a call's tokens"
    return f"{found['sparse']} calls sparse, {found['dense']} dense{share}"


def _fold(sites: list[str], most: int = 4) -> str:
    shown = ", ".join(sites[:most])
    return shown if len(sites) <= most else f"{shown} and {len(sites) - most} more"
