"""Models of transformers that see or hear, times recipes, times what else is asked of `generate`: right, or refused.

    python benchmarks/vlm_modes.py --state features.jsonl --json record.json   # goes on where it was stopped
    python benchmarks/vlm_modes.py --table                                     # docs/tokens.md's table from the record

About a CPU-minute a class and recipe. `tests/support/vlm_features.py` says what each feature is compared with.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from _harness import Benchmark, arguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))
import vlm_features  # noqa: E402
import vlm_zoo  # noqa: E402
from vlm_cases import Case  # noqa: E402

RECORD, PAGE = ROOT / "benchmarks" / "results" / "vlm_modes.json", ROOT / "docs" / "tokens.md"
MARKS = "<!-- vlm features -->\n", "<!-- end of the features -->\n"
Row = dict[str, str]


def child(name: str, recipes: Sequence[str], columns: Sequence[str], state: Path) -> None:
    """One class's rows, one a recipe, written as they come."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    case = Case(name)
    for recipe in recipes:
        made = vlm_features.Features(name, recipe, case)
        row = {"model": name, "recipe": recipe, **{column: made.cell(column) for column in columns}}
        with state.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def rows_in(state: Path) -> list[Row]:
    """The newest row of each class and recipe, in the zoo's order."""
    lines = state.read_text().splitlines() if state.exists() else []
    found = {(row["model"], row["recipe"]): row for row in map(json.loads, lines)}
    return [found[n, r] for n in vlm_zoo.ZOO for r in vlm_features.RECIPES if (n, r) in found]


def table(rows: Sequence[Row]) -> str:
    """A line a class and recipe in Markdown; what was raised stands below."""
    notes: list[str] = []

    def short(said: str | None) -> str:
        if said is None or said == "equal":
            return said or ""
        text = re.sub(r"\s+", " ", said).replace("|", "\\|")
        if text not in notes:
            notes.append(text)
        return ("refused" if vlm_features.holds(said) else "**fault**") + f" [{notes.index(text) + 1}]"

    columns = vlm_features.COLUMNS
    lines = ["| class | recipe | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    lines += [
        f"| {r['model']} | {r['recipe']} | " + " | ".join(short(r.get(c)) for c in columns) + " |"
        for r in rows
    ]
    every = len(vlm_zoo.ZOO) * len(vlm_features.RECIPES)
    left = [f"Run so far: {len(rows)} of {every} lines.", ""] if len(rows) < every else []
    return "\n".join([*lines, "", *left, *(f"{n}. {text}" for n, text in enumerate(notes, 1))])


def write_table(rows: Sequence[Row]) -> None:
    head, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(head + MARKS[0] + table(rows) + "\n" + MARKS[1] + rest.split(MARKS[1])[1])


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", nargs="*", help="these classes")
        parser.add_argument("--recipes", nargs="*", default=list(vlm_features.RECIPES), help="these recipes")
        parser.add_argument("--columns", nargs="*", default=list(vlm_features.COLUMNS), help="these features")
        parser.add_argument(
            "--state", type=Path, help="a file of rows, one JSON a line; rows there are not run again"
        )
        parser.add_argument("--table", action="store_true", help="write the page's table from the record")
        parser.add_argument("--child", help=argparse.SUPPRESS)

    args = arguments(__doc__, add)
    if args.table:
        write_table(json.loads(RECORD.read_text())["rows"])
        return
    state = args.state or Path("vlm_modes.jsonl")
    if args.child:
        child(args.child, args.recipes, args.columns, state)
        return
    bench = Benchmark("vlm_modes", args)
    for name in args.only or list(vlm_zoo.ZOO)[: 1 if args.quick else None]:
        have = {row["recipe"] for row in rows_in(state) if row["model"] == name}
        left = [recipe for recipe in args.recipes if recipe not in have]
        if left:
            subprocess.run([sys.executable, __file__, "--child", name, "--state", str(state), "--recipes", *left,
                            "--columns", *args.columns], env=dict(os.environ, OMP_NUM_THREADS="1"))  # fmt: skip
    rows = rows_in(state)
    for row in rows:
        bench.row(**row)
    cells = [said for row in rows for column, said in row.items() if column in vlm_features.COLUMNS]
    held = sum(map(vlm_features.holds, cells)) / max(1, len(cells))
    bench.claim("cells that are right, or refused with the reason", held, "== 1")
    bench.finish()


if __name__ == "__main__":
    main()
