"""Claims and plots of benchmarks/rsq.py, from the rows measured so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _rsq_other

Row = Mapping[str, Any]
CURVE = ("rsq2-g64", "rsq-mixed-2.25", "rsq-mixed-2.5", "rsq-mixed-3")


def claims(bench: Any, rows: Sequence[Row], said: str) -> None:
    """Each line of the table that the rows can decide; the rest as not measured."""
    found = {(r["row"], r["seed"]): r for r in rows}
    texts = [k.removeprefix("ppl_") for k in found.get(("fp32", 0), {}) if k.startswith("ppl_")]
    if "debian" not in texts:
        bench.not_measured("perplexity on the second text", f"{said}.".capitalize())
    seeds = sorted(s for name, s in found if name == "rsq3" and ("quarot3", s) in found)
    for seed in seeds:
        ours, theirs = found["rsq3", seed], found["quarot3", seed]
        bench.claim(f"3-bit RSQ: KL against rotate + GPTQ, seed {seed}", ours["kl"] / theirs["kl"], "<= 0.85")
        for text in texts:
            ratio = ours[f"ppl_{text}"] / theirs[f"ppl_{text}"]
            bench.claim(f"3-bit RSQ: perplexity against rotate + GPTQ, {text}, seed {seed}", ratio, "< 1.0")
    if len(seeds) < 3:
        bench.not_measured("3-bit RSQ against rotate + GPTQ in three seeds", f"{len(seeds)} seeds were run.")

    def compare(claim: str, ours: str, theirs: str, key: str, target: str, invert: bool = True) -> None:
        if (ours, 0) not in found or (theirs, 0) not in found:
            missing = ours if (ours, 0) not in found else theirs
            absent = _rsq_other.ABSENT if missing == _rsq_other.NAME else f"The row {missing} was not run."
            bench.not_measured(claim, absent)
            return
        for name in (key,) if key == "kl" else [f"ppl_{t}" for t in texts]:
            a, b = found[ours, 0][name], found[theirs, 0][name]
            where = "" if key == "kl" else ", " + name.removeprefix("ppl_")
            bench.claim(claim + where, b / a if invert else a / b, target)

    compare("3-bit RSQ: KL of llm-compressor's GPTQ over its own", "rsq3", "llm-compressor3", "kl", ">= 2")
    compare("3-bit RSQ: perplexity of RTN over its own", "rsq3", "rtn3", "ppl", ">= 15")
    name = "4-bit RSQ group 64, {}: perplexity over fp32's"
    for row, kind in (("rsq4-g64", "symmetric"), ("rsq4-g64-asym", "asymmetric")):
        compare(name.format(kind), row, "fp32", "ppl", "<= 1.06", invert=False)
    compare(
        "RSQ onto NVFP4: KL over that of NVFP4 RTN", "nvfp4-rsq", "nvfp4-rtn", "kl", "<= 0.75", invert=False
    )
    compare("RSQ onto NVFP4: perplexity over fp32's", "nvfp4-rsq", "fp32", "ppl", "<= 1.12", invert=False)
    if "w4a4_ppl_python" in found.get(("nvfp4-rsq", 0), {}):
        for text in texts:
            ratio = found["nvfp4-rsq", 0][f"w4a4_ppl_{text}"] / found["fp32", 0][f"ppl_{text}"]
            bench.claim(f"RSQ onto NVFP4, activations of quantized linears too: perplexity over fp32's, {text}", ratio,
                        "<= 1.2")  # fmt: skip
    absent = [name for name in CURVE if (name, 0) not in found]
    if absent:
        there = (
            "docs/rsq-bits.svg shows the others" if len(absent) < len(CURVE) else "there is nothing to plot"
        )
        bench.not_measured(
            "2-bit group 64 with mixed precision: the whole curve of bits against KL",
            f"Not run yet: {', '.join(absent)}; {there}.",
        )


def plots(rows: Sequence[Row], docs: Path) -> None:
    """docs/rsq-bits.svg: bits a weight against KL; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    kinds = {
        "rounded": ("rtn3", "rtn4", "nvfp4-rtn"),
        "GPTQ": ("gptq3", "gptq4"),
        "rotate + GPTQ (QuaRot)": ("quarot3", "quarot4"),
        "RSQ, one width": ("rsq2-g64", "rsq3", "rsq3-asym", "rsq4", "rsq4-g64", "rsq4-g64-asym"),
        "RSQ, mixed widths, group 64": CURVE[1:],
        "RSQ onto NVFP4": ("nvfp4-rsq",),
        "llm-compressor GPTQ": ("llm-compressor3",),
    }
    found = {r["row"]: r for r in rows if r["seed"] == 0}
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, names in kinds.items():
        points = sorted((found[n]["bits"], found[n]["kl"]) for n in names if n in found)
        if points:
            axes.semilogy(*zip(*points), "o-", label=label)
    axes.set(xlabel="bits a weight, scales included", ylabel="KL to fp32, nats a token",
             title="SmolLM2-135M-Instruct, held-out text")  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(docs / "rsq-bits.svg")


def add_claims_of(bench: Any, path: Path) -> None:
    """Rows and claims of another part of this benchmark, which was timed apart."""
    if path.exists():
        record = json.loads(path.read_text())
        bench.rows += record["rows"]
        bench.claims += record["claims"]
        bench.missing += record["not_measured"]
