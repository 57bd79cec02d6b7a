"""The certificate: what was done to a model, what that cost in accuracy, and what it rests on.

It is kept with a session and inside a saved artifact, so that a file found a year later still says
which weights and which recipe it came from, on what machine it was verified, which sites were left
alone and why, and how far its results were from the original's. It is plain data: no tensor and no
code, `from_json(to_json())` gives an equal one.

    certificate = compiled.certificates[0]
    certificate.to_json()
    Certificate.from_json(text).check(program=loaded)      # raises when the program is another one
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from thresher.graph.program import weights_fingerprint

from .. import ops, option_types
from ..errors import ArgumentError, ThresherError
from ..graph.program import Program
from ..recipe import Recipe
from ..report import PassReport, Report

FORMAT = "thresher-certificate-1"
PACKAGES = ("thresher", "torch", "transformers", "triton", "numpy", "onnx", "onnxruntime")


@dataclass(frozen=True)
class OpProof:
    """One operator of ours that the program calls.

    calls: nodes in the graph. provider: what ran it on the example; without one, what this machine would run it
        with before arguments are seen.
    tolerance: largest relative L2 error a provider may have against the operator's reference, by dtype; the
        suite tests every provider within it.
    error: the largest there was on the example inputs, over the `checked` calls that were compared (the first
        few); None when no call was. Of integer results it is the share of elements that differ.
    """

    name: str
    calls: int
    provider: str
    tolerance: dict[str, float]
    error: float | None = None
    checked: int = 0


@dataclass(frozen=True)
class Certificate:
    """Plain data; see the module's docstring.

    passes: as in `Report`. error: of the whole recipe, relative to the largest value of the output; None when not
        measured, and then `unverified` says why. against: what it was measured from: a run of the captured program in
        "float32" or "float64", or "the program before". own: the captured program's own error from that run.
    budget: what `error` may be. checked: the batches the proof saw, in words; docs/numerics.md says what it proves.
    weights, program, recipe_fingerprint: hashes. recipe: what `Recipe.of` turns into the same recipe.
    predicted: time before over time after by the cost model; None without a prediction.
    measured: the same, timed on `machine`; None until `thresher bench` or `thresher.tools.bench.compare` has run.
    """

    recipe: dict[str, Any]
    recipe_fingerprint: str
    weights: str
    program: str
    target: str
    passes: tuple[PassReport, ...] = ()
    ops: tuple[OpProof, ...] = ()
    error: float | None = None
    budget: float = 0.0
    unverified: str | None = None
    predicted: float | None = None
    measured: float | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    own: float | None = None
    against: str = "the program before"
    checked: tuple[str, ...] = ()
    format: str = FORMAT

    @property
    def holds(self) -> bool:
        """Whether the whole recipe was measured and stayed within its budget."""
        return self.error is not None and self.error <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain data; infinities and NaN are left as they are."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """JSON without NaN or infinity, which many readers refuse; they become null."""
        return json.dumps(plain(self.to_dict()), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Certificate:
        """Raises ArgumentError for anything `to_dict` did not write."""
        try:
            if given["format"] != FORMAT:
                raise ValueError(f"its format is {given['format']!r}")
            known = dict(given)
            known["passes"] = tuple(PassReport.from_dict(p, strict=True) for p in known["passes"])
            known["ops"] = tuple(OpProof(**o) for o in known["ops"])
            known["notes"], known["checked"] = tuple(known["notes"]), tuple(known["checked"])
            if known["budget"] is None:  # JSON has no infinity
                known["budget"] = float("inf")
            made = cls(**known)
            for part in (made, *made.ops):
                option_types.check("the field", part)
            return made
        except (KeyError, TypeError, ValueError, AttributeError) as reason:
            said = f"something else ({reason})"
            accepted = f"what {FORMAT} describes"
            raise ArgumentError("certificate", said, accepted, "Compile the model again.") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """The certificate that `to_json` wrote. Raises ArgumentError for anything else."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as reason:
            raise ArgumentError(
                "certificate", f"no JSON ({reason})", "what to_json wrote", "Compile again."
            ) from None
        if not isinstance(given, dict):
            raise ArgumentError(
                "certificate", type(given).__name__, "a JSON object", "Compile the model again."
            )
        return cls.from_dict(given)

    def check(self, program: Program | None = None, recipe: Recipe | None = None) -> None:
        """Raise ThresherError when the rewritten program or the recipe is not the one certified here."""
        for what, found, wanted in (
            ("program", program and program.fingerprint(), self.program),
            ("recipe", recipe and recipe.fingerprint(), self.recipe_fingerprint),
        ):
            if found is not None and found != wanted:
                raise ThresherError(f"The certificate is for {what} {wanted}, and this one is {found}.")

    def __rich__(self) -> Group:
        facts = Table(title="Certificate", title_justify="left", show_header=False)
        for name, shown in self._facts():
            facts.add_row(name, Text(shown, style="red" if shown.startswith("outside") else ""))
        passes = Table(title="passes", title_justify="left")
        for heading in ("pass", "rewritten", "missed", "rel. error", "model's own", "budget", "reasons"):
            passes.add_column(heading, overflow="fold")
        for p in self.passes:
            reasons = Counter(m.reason for m in p.missed).most_common(3)
            why = "\n".join(f"{count}x {reason}" for reason, count in reasons)
            passes.add_row(
                p.name,
                str(len(p.rewritten)),
                str(len(p.missed)),
                _number(p.error),
                "" if p.own is None else _number(p.own),
                f"{p.budget:.0e}",
                Text(why),
            )
        operators = Table(title="operators", title_justify="left")
        for heading in ("operator", "calls", "provider here", "rel. error", "tolerance"):
            operators.add_column(heading)
        for o in self.ops:
            operators.add_row(
                o.name,
                str(o.calls),
                o.provider,
                _number(o.error),
                ", ".join(f"{d} {t:.0e}" for d, t in o.tolerance.items()),
            )
        return Group(facts, *(t for t in (passes, operators) if t.row_count), *(Text(n) for n in self.notes))

    def _facts(self) -> list[tuple[str, str]]:
        verdict = (
            f"not measured: {self.unverified}" if self.error is None
            else f"{'within' if self.holds else 'outside'} budget: {self.error:.1e} of {self.budget:.0e}"
        )  # fmt: skip
        proof = f"{len(self.checked)} batches: {'; '.join(self.checked)}" if self.checked else "on no batch"
        if self.own is not None:
            proof += f". Error to a run in {self.against}; the model's own is {self.own:.1e}"
        return [
            ("whole recipe", verdict),
            ("checked on", proof),
            ("expected gain", "no prediction" if self.predicted is None else f"{self.predicted:.2f}x"),
            ("measured gain", "not measured" if self.measured is None else f"{self.measured:.2f}x"),
            ("target", self.target),
            ("weights", self.weights),
            ("recipe", self.recipe_fingerprint),
            ("program", self.program),
            ("machine", ", ".join(f"{k} {v}" for k, v in self.machine.items())),
            ("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items())),
            ("created", self.created),
        ]

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def certify(before: Program, after: Program, recipe: Recipe, report: Report) -> Certificate:
    """The certificate of one pipeline run. before: as captured; after: as rewritten."""
    return Certificate(
        recipe=recipe.to_dict(),
        recipe_fingerprint=recipe.fingerprint(),
        weights=weights_fingerprint(before),
        program=after.fingerprint(),
        target=report.target,
        passes=tuple(report.passes),
        ops=_op_proofs(after, report),
        error=report.error,
        budget=report.budget,
        unverified=report.unverified,
        predicted=report.predicted,
        measured=report.measured,
        notes=tuple(report.notes),
        own=report.own,
        against=report.against,
        checked=tuple(report.checked),
        versions=versions(),
        machine=machine(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _op_proofs(program: Program, report: Report) -> tuple[OpProof, ...]:
    calls = Counter(
        n.target._schema.name.split("::")[1]
        for n in program.nodes()
        if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == ops.NAMESPACE
    )
    proofs = []
    for name, count in sorted(calls.items()):
        op = ops.get(name)
        here = next((p.name for p in op.providers if op.usable(p) is None), "reference")
        tolerance = {str(d).removeprefix("torch."): t for d, t in op.tolerance.items()}
        check = report.operators.get(name)
        if check is None:
            proofs.append(OpProof(name, count, here, tolerance))
        else:
            proofs.append(OpProof(name, count, check.provider, tolerance, check.error, check.calls))
    return tuple(proofs)


def versions() -> dict[str, str]:
    """Python and the packages that results depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor and the GPU, as far as results and timings depend on them."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "cpu": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"


def plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null, anything unknown its text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
