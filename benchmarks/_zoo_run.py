"""One class of the zoo: what each way of running it came to, as fields of a row."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import _zoo_models as models
import torch

import thresher

NVFP4 = {"nvfp4": {"min_weights": 0, "budget": 99.0}, "min_gain": 0.0, "verify": False}
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15}
"""Largest difference of an output at real tokens, relative to its largest value; passes prove a finer one by themselves."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _said(reason: BaseException) -> str:
    lines = [line for line in str(reason).splitlines() if line.strip()] or [""]
    return f"{type(reason).__name__}: {lines[0][:300]}"


def _outputs(result: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def difference(got: Any, want: Any, given: dict[str, Any]) -> float:
    """Largest difference over outputs, relative to each one's largest value, at real tokens where it has tokens."""
    mask = given.get("attention_mask")
    worst = 0.0
    for a, b in zip(_outputs(got), _outputs(want), strict=True):
        if (
            mask is not None
            and b.dim() >= 2
            and b.shape[:2] == mask.shape
            and "decoder_input_ids" not in given
        ):
            a, b = a[mask.bool()], b[mask.bool()]
        if not b.numel() or not bool(torch.isfinite(b).all()):
            continue
        worst = max(worst, float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6)))
    return worst


def default_recipe(
    model: torch.nn.Module, given: dict[str, Any], want: Any, left: Any = None
) -> dict[str, Any]:
    """How the default recipe took a model: packed or the reason, and the largest difference from eager."""
    with _alone():
        before = {id(r) for r in thresher.reports()}
        fast = torch.compile(model, backend="thresher", options={"prepack": True, "target": "reference"})
        found = {"error": difference(fast(**given), want, given)}
        if left is not None:
            found["error_left"] = difference(fast(**left), model(**left), left)
        accounts = [
            r["prepack"]
            for r in thresher.reports()
            if id(r) not in before and any(p.name == "prepack" for p in r.passes)
        ]
    packed = any(a.rewritten for a in accounts)
    reasons = [m.reason for a in accounts for m in a.missed]
    said = "packed" if packed else (reasons or ["no graph of it was looked at"])[0]
    return {"packed": packed, "prepack": said, "graphs": len(accounts), **found}


def rounded(model: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """What NVFP4 covers, and whether each matrix of the graphs is rewritten or in a Miss."""
    with _alone():
        before = {id(r) for r in thresher.reports()}
        fast = torch.compile(model, backend="thresher", options={**NVFP4, "target": "reference"})
        fast(**given)
        reports = [r for r in thresher.reports() if id(r) not in before]
        accounts = [p for r in reports for p in r.passes if p.name == "nvfp4"]
    weights = [a.weights or {"rewritten": 0, "missed": 0} for a in accounts]
    done, left = (sum(w[k] for w in weights) for k in ("rewritten", "missed"))
    kept = [m.site for a in accounts for m in a.missed if "by keep=" in m.reason]
    sites = {
        s for a in accounts for s in (*a.rewritten, *(m.site for m in a.missed), *(m.site for m in a.apart))
    }
    lost = [
        n for n, p in model.named_parameters()
        if p.dim() >= 2 and len(accounts) == 1 and not {n, n.removesuffix(".weight")} & sites
    ]  # fmt: skip
    missed = sorted({m.reason[:160] for a in accounts for m in a.missed if m.site not in kept})
    return {"nvfp4_coverage": round(done / (done + left), 4) if done + left else None, "nvfp4_kept": len(kept),
            "nvfp4_missed": missed[:4], "unaccounted": lost[:4]}  # fmt: skip


def quantized(model: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """How many weights RSQ quantizes."""
    with _alone():
        low = thresher.quantize(model, [given], thresher.RSQ(bits=4, group_size=-1))
    return {"rsq": len(low.report.linears)}


def run(name: str, checks: tuple[str, ...] = ("left", "bf16", "nvfp4", "rsq")) -> dict[str, Any]:
    """The row of a class. outcome: "right", or what kept it: "no model", "no batch", "eager fails", "crashes", "differs"."""
    started = time.perf_counter()
    row: dict[str, Any] = {"class": name}
    model_class, config_class = models.one(name)

    def ended(outcome: str, reason: str = "") -> dict[str, Any]:
        row.update(outcome=outcome, seconds=round(time.perf_counter() - started, 1))
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
    row["text"] = "attention_mask" in given
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = model(**given)
    except Exception as reason:
        return ended("eager fails", _said(reason))
    try:
        with _alone():
            row["backend_error"] = difference(torch.compile(model, backend="eager")(**given), want, given)
    except Exception as reason:
        return ended("torch.compile fails", _said(reason))
    worst = "right"
    for check in ("default", *checks):
        try:
            if check == "default":
                left = models.batch(model, left=True) if "left" in checks and row["text"] else None
                row.update(default_recipe(model, given, want, left))
            elif check == "bf16":
                half = models.build(model_class, config_class).to(torch.bfloat16)
                at = {
                    k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                    for k, v in given.items()
                }
                with torch.no_grad():
                    wide = half(**at)
                row["error_bf16"] = default_recipe(half, at, wide)["error"]
            elif check == "nvfp4":
                row.update(rounded(model, given))
            elif check == "rsq":
                row.update(quantized(model, given))
        except Exception as reason:
            row[f"{check}_raises"] = _said(reason)
            if check in ("default", "bf16", "nvfp4"):
                worst = "crashes"
    wide = max(row.get("error", 0.0), row.get("error_left", 0.0))
    if worst == "right" and (
        wide > TOLERANCE[torch.float32] or row.get("error_bf16", 0.0) > TOLERANCE[torch.bfloat16]
    ):
        worst = "differs"
    return ended(worst)
