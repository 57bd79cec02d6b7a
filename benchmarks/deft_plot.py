"""Draws docs/deft.svg from the kept results of benchmarks/deft.py. Run after either of them changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str, part: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return [r for r in json.loads(path.read_text())["rows"] if r["part"] == part] if path.exists() else []


def main() -> None:
    figure, (speed, trade) = plt.subplots(1, 2, figsize=(10, 4))
    kernel = rows("deft.json", "kernel")
    for kind in dict.fromkeys(r["type"] for r in kernel):
        mine = [r for r in kernel if r["type"] == kind and r["shape"] == kernel[0]["shape"]]
        speed.plot([100 * r["density"] for r in mine], [r["of_ideal"] for r in mine], "o-", label=kind)
    speed.axhline(1.0, color="grey", linestyle=":")
    speed.set(
        xlabel="neurons on, %", ylabel="fraction of byte-ideal", ylim=(0, 1.15), title="CPU kernel, one token"
    )
    speed.legend()
    for form, mark in (("ReLU", "o"), ("ReGLU", "s")):
        found = [r for r in rows("deft-train.json", "train") if r["form"] == form]
        for label, start in (("with the loss", "loss"), ("thresholded", "control t")):
            mine = sorted((r["density"], r["accuracy"]) for r in found if r["run"].startswith(start))
            style = "-" if start == "loss" else "--"
            trade.plot(
                [100 * d for d, _ in mine], [100 * a for _, a in mine], mark + style, label=f"{form}, {label}"
            )
        for r in found:
            if r["run"] == "control":
                trade.axhline(100 * r["accuracy"], color="grey", linestyle=":")
    trade.set(xlabel="exact density, %", ylabel="accuracy, %", title="digits, 5 seeds; dotted: controls")
    trade.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "deft.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
