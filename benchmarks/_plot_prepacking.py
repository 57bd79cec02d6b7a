"""Draws docs/prepacking.svg from benchmarks/results/prepacking.json: speed-up by length set, and the bound."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
FORMS = ("length-ordered", "bin-packed", "flattening", "ours")
COLOURS = ("#b8b8b8", "#8fa8c8", "#d9b38c", "#2f6f4f")


def main() -> None:
    rows = json.loads((ROOT / "benchmarks/results/prepacking.json").read_text())["rows"]
    sets = [name for name in dict.fromkeys(r["lengths"] for r in rows) if name != "all-same"]
    figure, axes = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(FORMS)
    for i, (form, colour) in enumerate(zip(FORMS, COLOURS)):
        heights = [next(r["speedup"] for r in rows if r["lengths"] == s and r["form"] == form) for s in sets]
        axes.bar([x + (i - 1.5) * width for x in range(len(sets))], heights, width, label=form, color=colour)
    for x, name in enumerate(sets):
        bound = next(r["bound"] for r in rows if r["lengths"] == name)
        label = "bound by FLOPs" if x == 0 else None
        axes.hlines(bound, x - 0.42, x + 0.42, color="black", linewidth=1.2, linestyles="dotted", label=label)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_ylim(0, 15)
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel("times padded torch.compile")
    axes.legend(frameon=False, ncols=5, loc="upper right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/prepacking.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
