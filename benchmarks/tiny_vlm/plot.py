"""Draws docs/tiny_vlm.svg from benchmarks/results/tokens-tiny_vlm.json: accuracy over FLOPs. Run after it changes.

python -m tiny_vlm.plot   # in benchmarks/
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
CURVES = {  # as the record names it: style
    "transprune": "o-",
    "iga": "^-",
    "ttv": "v-",
    "fastv": "x-",
    "oracle": "k:",
    "uniform": "s--",
    "random": "d--",
    "anti-oracle": "k-.",
}
POINTS = {"zipvl, protected": "P", "zipvl, keys and values at 4/2 bits": "*"}


def main() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "tokens-tiny_vlm.json").read_text())
    found: dict[str, dict[float, list[dict[str, float]]]] = {}
    for row in record["rows"]:
        found.setdefault(row["form"], {}).setdefault(row["keep"], []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, turn, title in zip(
        axes, ("t1", "t2"), ("the question asked", "a second question on what was kept")
    ):

        def at(form: str, keep: float, turn: str = turn) -> tuple[float, float]:
            rows = found[form][keep]
            return mean(r["flops_share"] for r in rows), 100 * mean(r[turn] for r in rows)

        dense = at("dense", 1.0)
        axis.axhline(dense[1], color="grey", linewidth=0.8)
        axis.text(0.7, dense[1] + 1.5, "dense", color="grey")
        for form, style in CURVES.items():
            points = sorted(at(form, keep) for keep in found[form])
            axis.plot(*zip(*points, dense), style, label=form, markersize=5)
        points = sorted(at("transprune, 50% spread", keep) for keep in found["transprune, 50% spread"])
        axis.plot(*zip(*points, dense), "o-", mfc="none", label="transprune, half of it spread", markersize=5)
        for form, mark in POINTS.items():
            ((keep, _),) = found[form].items()
            axis.plot(*at(form, keep), mark, label=form, markersize=9, color="tab:olive")
        axis.set(xlabel="share of the decoder layers' FLOPs", title=title, xlim=(0.22, 1.02), ylim=(38, 101))
    axes[0].set_ylabel("chain questions answered, %")
    axes[1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "tiny_vlm.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
