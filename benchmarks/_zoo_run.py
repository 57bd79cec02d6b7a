"""One class of the zoo: what each way of running it came to, as fields of a row.

Dynamo traces a model once for all recipes in fp32: the backend here compiles each graph several ways and runs the one
that is asked for, so that a class costs one trace and not four.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _zoo_models as models
import torch
from _zoo_sample import SAMPLE

import thresher
from thresher import sessions
from thresher.backend import thresher_backend
from thresher.calibration_data import batches_of
from thresher.graph.program import Program
from thresher.passes.rsq.quantizer.driver import Driver

WAYS: dict[str, dict[str, Any]] = {
    "default": {"prepack": True},
    "nvfp4": {"nvfp4": {"min_weights": 0, "budget": 99.0}, "min_gain": 0.0, "verify": False},
}
"""Recipes by the name of their check, all on the reference target."""
TOLERANCE = 1e-3
"""Largest difference in fp32 of an output at real tokens, relative to its largest value; passes prove a finer one."""
HALF = 0.1
"""The same in bf16 from eager in bf16; beyond it a row is right where it is no further from fp32 than twice eager's way."""


@contextlib.contextmanager
def _alone() -> Iterator[list[warnings.WarningMessage]]:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        yield said


def _said(reason: BaseException) -> str:
    lines = [line for line in str(reason).splitlines() if line.strip()] or [""]
    return f"{type(reason).__name__}: {lines[0][:300]}"


def _outputs(result: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def difference(got: Any, want: Any, given: dict[str, Any], pooled: bool = True) -> float:
    """Largest difference over outputs, relative to each one's largest value, at real tokens where it has tokens.

    pooled: look also at outputs [rows, width], which a model may have read from a pad.
    """
    mask = given.get("attention_mask")
    worst = 0.0
    for a, b in zip(_outputs(got), _outputs(want), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not pooled and b.dim() == 2 and len(b) == len(mask) and b.shape != mask.shape:
            continue
        if mask is not None and b.dim() >= 2 and b.shape[:2] == mask.shape:  # no decoder's is as long
            a, b = a[mask.bool()], b[mask.bool()]
        known = torch.isfinite(b)
        if not known.any():
            continue
        a, b = a[known].float(), b[known].float()
        gap = (a - b).abs().max()
        worst = max(worst, float("inf") if gap.isnan() else float(gap / b.abs().max().clamp_min(1e-6)))
    return worst


class Ways:
    """A backend of Dynamo that compiles each graph by every recipe and runs the one named in `way`.

    accounts: reports by recipe, one for each graph. failed: what a recipe raised. warned: its warnings.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.way, self.names = "eager", names
        self.accounts: dict[str, list[Any]] = {n: [] for n in names}
        self.failed: dict[str, str] = {}
        self.warned: dict[str, list[str]] = {n: [] for n in names}
        self.held: list[set[str]] = []  # what each graph multiplies by, or reads
        self.programs: list[Program] = []  # each graph as captured

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        made: dict[str, Callable[..., Any]] = {"eager": gm.forward}
        for name in self.names:
            with warnings.catch_warnings(record=True) as said, sessions.collect() as built:
                warnings.simplefilter("always")
                try:
                    made[name] = thresher_backend(
                        gm, example_inputs, options={**WAYS[name], "target": "reference"}
                    )
                except Exception as reason:
                    self.failed.setdefault(name, _said(reason))
            self.warned[name] += [str(w.message) for w in said if "thresher" in str(w.message)]
            self.accounts[name] += [s.report for s in built]
            if name == self.names[-1]:
                self.programs += [s.captured for s in built]
            if name == "nvfp4":
                self.held += [{w.fqn for w in s.captured.weights.values()} for s in built]

        def call(*args: Any) -> Any:
            return made.get(self.way, gm.forward)(*args)

        return call

    def faults(self) -> list[str]:
        """What a recipe raised, or ran without by a fault of its own."""
        own = [
            w
            for said in self.warned.values()
            for w in said
            if "fault of its own" in w or "left out a pass" in w
        ]
        return [*self.failed.values(), *own]


def packing(ways: Ways) -> dict[str, Any]:
    """Whether the default recipe packed a graph, or why not."""
    accounts = [r["prepack"] for r in ways.accounts["default"] if any(p.name == "prepack" for p in r.passes)]
    packed = any(a.rewritten for a in accounts)
    reasons = [m.reason for a in accounts for m in a.missed] + [
        f"It was rolled back: {a.rolled_back}" for a in accounts if a.rolled_back
    ]
    said = "packed" if packed else (reasons or ways.warned["default"] or ["no graph of it was looked at"])[0]
    back = [str(a.rolled_back) for a in accounts if a.rolled_back]
    found = {"packed": packed, "prepack": said[:600], "graphs": len(accounts)}
    return {**found, "rolled_back": back} if back else found


def rounding(model: torch.nn.Module, ways: Ways) -> dict[str, Any]:
    """What NVFP4 covers, and whether each matrix of the graphs is rewritten or in a Miss."""
    accounts = [p for r in ways.accounts["nvfp4"] for p in r.passes if p.name == "nvfp4"]
    weights = [a.weights or {"rewritten": 0, "missed": 0} for a in accounts]
    done, left = (sum(w[k] for w in weights) for k in ("rewritten", "missed"))
    kept = [m.site for a in accounts for m in a.missed if "by keep=" in m.reason]
    sites = {
        s for a in accounts for s in (*a.rewritten, *(m.site for m in a.missed), *(m.site for m in a.apart))
    }
    names: dict[int, set[str]] = {}  # of a tied weight all
    for n, p in model.state_dict(keep_vars=True).items():
        names.setdefault(id(p), set()).update((n, n.removesuffix(".weight")))
    lost = [
        n
        for n, p in model.named_parameters()
        if p.dim() >= 2 and not names[id(p)] & sites and any(names[id(p)] & held for held in ways.held)
    ]
    missed = sorted({m.reason[:160] for a in accounts for m in a.missed if m.site not in kept})
    sizes = {n: p.numel() * p.element_size() for n, p in model.state_dict(keep_vars=True).items()}
    beside = left - sum(sizes.get(k, sizes.get(f"{k}.weight", 0)) for k in set(kept))
    return {"nvfp4_coverage": round(done / (done + left), 4) if done + left else None, "nvfp4_kept": len(kept),
            "nvfp4_beside_kept": round(done / (done + beside), 4) if done + beside > 0 else None,
            "nvfp4_missed": missed[:4], "unaccounted": lost[:4]}  # fmt: skip


def quantized(model: torch.nn.Module, given: dict[str, Any], program: Program | None) -> dict[str, Any]:
    """How many weights RSQ quantizes, and their share of all that products multiply by, head and routers left out.

    program: what the model was captured as, which spares a trace; None to go in by `thresher.quantize`.
    """
    sizes = {n: p.numel() for n, p in model.state_dict(keep_vars=True).items()}
    config = thresher.RSQ(bits=4, group_size=-1)
    if program is None:
        with _alone():
            report = thresher.quantize(model, [given], config).report
        linears, missed = report.linears, report.missed
    else:
        outcome = Driver(program, list(batches_of([given], None, 1, 1, 1, 0, config)), config).run()
        linears, missed = list(outcome.reports.values()), outcome.plan.missed
    size = lambda site: sizes.get(site, sizes.get(f"{site}.weight", 0))  # noqa: E731
    done = {r.site.split("[")[0] for r in linears}
    left = {m.site for m in missed if "by keep=" not in m.reason} - done
    whole = sum(map(size, done)) + sum(map(size, left))
    return {"rsq": len(linears), "rsq_beside_kept": round(sum(map(size, done)) / whole, 4) if whole else None,
            "rsq_missed": sorted({m.reason[:160] for m in missed if m.site in left})[:4]}  # fmt: skip


def in_half(
    model_class: type, config_class: type, given: dict[str, Any], exact: Any
) -> tuple[dict[str, Any], bool]:
    """How far the default recipe in bf16 is from eager in bf16, and whether that is right."""
    half = models.build(model_class, config_class).to(torch.bfloat16)
    at = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    with _alone():
        try:
            eager = half(**at)
        except Exception as reason:
            return {"bf16": f"eager fails: {_said(reason)}"}, True
        ways = Ways(["default"])
        fast = torch.compile(half, backend=ways)
        by_itself = difference(fast(**at), eager, at)
        ways.way = "default"
        got = fast(**at)
    if ways.faults():
        raise RuntimeError(ways.faults()[0])
    error, ours, theirs = (
        difference(got, eager, at),
        difference(got, exact, given),
        difference(eager, exact, given),
    )
    right = error <= max(HALF, 1.5 * by_itself) or ours <= 2 * theirs
    return {"error_bf16": error, **packing_of_half(ways)}, right


def packing_of_half(ways: Ways) -> dict[str, Any]:
    found = packing(ways)
    if found["packed"]:
        return {"packed_bf16": True}
    return {"packed_bf16": False, "prepack_bf16": found["prepack"]}


def run(name: str, checks: tuple[str, ...] = ("left", "bf16", "nvfp4", "rsq")) -> dict[str, Any]:
    """The row of a class. outcome: "right", or what kept it: "no model", "no batch", "eager fails", "crashes", "differs"."""
    started = time.process_time()
    row: dict[str, Any] = {"class": name}
    model_class, config_class = models.one(name)

    def ended(outcome: str, reason: str = "") -> dict[str, Any]:
        row.update(outcome=outcome, seconds=round(time.process_time() - started, 1))
        if reason:
            row["reason"] = reason
        return row

    try:
        model = models.build(model_class, config_class)
    except Exception as reason:
        return ended("no model", _said(reason))
    row["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        given = models.batch(model)
    except Exception as reason:
        return ended("no batch", _said(reason))
    row["text"] = "input_ids" in given and "attention_mask" in given
    ways = Ways(["default", *(["nvfp4"] if "nvfp4" in checks else [])])
    with _alone():
        try:
            want = model(**given)
        except Exception as reason:
            return ended("eager fails", _said(reason))
        fast = torch.compile(model, backend=ways)
        try:
            row["backend_error"] = difference(fast(**given), want, given)
        except Exception as reason:
            return ended("torch.compile fails", _said(reason))
        problems, wrong = ways.faults(), False
        row.update(packing(ways))
        batches = {"error": given}
        if "left" in checks and row["text"]:
            batches["error_left"] = models.batch(model, left=True)
        for field, batch in batches.items():
            try:
                ways.way = "default"
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    got = fast(**batch)
                pads = any("is a pad there" in str(w.message) for w in told)
                row[field] = difference(got, model(**batch), batch, pooled=not pads)
            except Exception as reason:
                problems.append(f"{field}: {_said(reason)}")
        if "nvfp4" in checks:
            row.update(rounding(model, ways))
            try:
                ways.way = "nvfp4"
                fast(**given)
            except Exception as reason:
                problems.append(f"nvfp4: {_said(reason)}")
    wrong = max(row.get("error", 0.0), row.get("error_left", 0.0)) > TOLERANCE + 2 * row["backend_error"]
    for check in ("bf16", "rsq"):
        if check not in checks:
            continue
        try:
            if check == "rsq":
                spared = len(ways.programs) == 1 and name not in SAMPLE  # those go in by the front door
                row.update(quantized(model, given, ways.programs[0] if spared else None))
            else:
                found, right = in_half(model_class, config_class, given, want)
                row.update(found)
                wrong = wrong or not right
        except Exception as reason:
            row[f"{check}_raises"] = _said(reason)
            if check == "bf16":
                problems.append(f"bf16: {_said(reason)}")
    if problems:
        return ended("crashes", " | ".join(dict.fromkeys(problems))[:1500])
    return ended("differs" if wrong else "right")
