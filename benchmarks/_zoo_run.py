"""One class of the zoo: what each way of running it came to, as fields of a row."""

from __future__ import annotations

import time
import warnings
from typing import Any

import _zoo_models as models
import torch
from _zoo_half import in_half
from _zoo_sample import SAMPLE
from _zoo_ways import Ways, alone, difference, packing, said_of

import thresher
from thresher.calibration_data import batches_of
from thresher.graph.program import Program
from thresher.passes.rsq.quantizer.driver import Driver

TOLERANCE = 1e-3
"""Largest difference in fp32 of an output at real tokens, relative to its largest value; passes prove a finer one."""


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
        with alone():
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


def run(name: str, checks: tuple[str, ...] = ("left", "bf16", "nvfp4", "rsq")) -> dict[str, Any]:
    """The row of a class. outcome: "right", or what kept it: "no model", "no batch", "eager fails", "crashes", "differs"."""
    started = time.process_time()
    row: dict[str, Any] = {"class": name}

    def ended(outcome: str, reason: str = "") -> dict[str, Any]:
        row.update(outcome=outcome, seconds=round(time.process_time() - started, 1))
        if reason:
            row["reason"] = reason
        return row

    try:
        model_class, config_class = models.one(name)
        model = models.build(model_class, config_class)
    except Exception as reason:
        return ended("no model", said_of(reason))
    row["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        given = models.batch(model)
    except Exception as reason:
        return ended("no batch", said_of(reason))
    row["text"] = "input_ids" in given and "attention_mask" in given
    ways = Ways(["default", *(["nvfp4"] if "nvfp4" in checks else [])])
    with alone():
        try:
            want = model(**given)
        except Exception as reason:
            return ended("eager fails", said_of(reason))
        fast = torch.compile(model, backend=ways)
        try:
            row["backend_error"] = difference(fast(**given), want, given)
        except Exception as reason:
            return ended("torch.compile fails", said_of(reason))
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
                problems.append(f"{field}: {said_of(reason)}")
        if "nvfp4" in checks:
            row.update(rounding(model, ways))
            try:
                ways.way = "nvfp4"
                fast(**given)
            except Exception as reason:
                problems.append(f"nvfp4: {said_of(reason)}")
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
            row[f"{check}_raises"] = said_of(reason)
            if check == "bf16":
                problems.append(f"bf16: {said_of(reason)}")
    if problems:
        return ended("crashes", " | ".join(dict.fromkeys(problems))[:1500])
    return ended("differs" if wrong else "right")
