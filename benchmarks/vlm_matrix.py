"""Models of transformers that see or hear, times what a user does with `generate` behind token pruning: right, or refused.

Random tiny models, unmodified classes. Each runs in a process of its own; the table goes to docs/tokens.md (`--table` writes
it from the record without running). `equal` compares logits and tokens of every step, `runs` says that nothing equal is
at hand to compare with, and anything else is what was raised.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, arguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))
import vlm_zoo  # noqa: E402
from vlm_cases import Case  # noqa: E402

RECORD, PAGE = ROOT / "benchmarks" / "results" / "vlm_matrix.json", ROOT / "docs" / "tokens.md"
COLUMNS = {
    "whole": "100 % kept",
    "text": "then text alone",
    "cut": "half kept, two images",
    "rows": "half kept, padded rows",
    "turn": "second turn",
    "zipvl": "ZipVL, half kept",
    "half": "half kept, bf16",
}


def child(name: str, columns: list[str]) -> dict[str, Any]:
    """One class's row of the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    case, found, traces = Case(name), {}, {}
    for column in columns:
        try:
            found[column] = getattr(case, column)()
        except Exception as error:
            found[column] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            traces[column] = traceback.format_exc()[-3000:]
    return {"found": found, "traces": traces}


def holds(said: str) -> bool:
    return said == "equal" or said.startswith(
        ("ArgumentError", "NothingRewrittenError", "not in transformers")
    )


def table(rows: list[dict[str, str]]) -> str:
    """The record's rows in Markdown; what was raised stands below, and what was not run."""
    notes: list[str] = []

    def short(said: str | None) -> str:
        if said is None:
            return ""
        if said == "equal":
            return "equal"
        text = re.sub(r"\s+", " ", said).replace("|", "\\|")
        if text not in notes:
            notes.append(text)
        return ("refused" if holds(said) else "**fault**") + f" [{notes.index(text) + 1}]"

    lines = ["| class | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {r['model']} | " + " | ".join(short(r.get(c)) for c in COLUMNS) + " |" for r in rows]
    left = [name for name in vlm_zoo.ZOO if name not in {r["model"] for r in rows}]
    said = [f"Not run so far: {', '.join(left)}, and what is empty above.", ""] if left else []
    return "\n".join([*lines, "", *said, *(f"{n}. {text}" for n, text in enumerate(notes, 1))])


def write_table(rows: list[dict[str, str]]) -> None:
    page = PAGE.read_text()
    begin, end = "<!-- vlm matrix -->\n", "<!-- end of the matrix -->\n"
    head, rest = page.split(begin)
    PAGE.write_text(head + begin + table(rows) + "\n" + end + rest.split(end)[1])


def add_records(paths: list[Path]) -> None:
    """Put rows of other records, such as one a class, into the kept one: the newest of each class, in the zoo's order."""
    found = {}
    for path in [*([RECORD] if RECORD.exists() else []), *paths]:
        record = json.loads(path.read_text())
        for row in record["rows"]:
            found[row["model"]] = found.get(row["model"], {}) | row
    record["rows"] = [found[name] for name in vlm_zoo.ZOO if name in found]
    cells = [said for row in record["rows"] for column, said in row.items() if column in COLUMNS]
    share = sum(map(holds, cells)) / len(cells)
    record["claims"] = [record["claims"][0] | {"value": share, "holds": share == 1}]
    record["command"] = "python benchmarks/vlm_matrix.py"
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", nargs="*", help="these classes")
        parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=list(COLUMNS))
        parser.add_argument("--table", action="store_true", help="write the page's table from the record")
        parser.add_argument(
            "--add", type=Path, nargs="*", help="records to take into the kept one; nothing is run"
        )

    args = arguments(__doc__, add)
    if args.add:
        add_records(args.add)
    if args.table or args.add:
        write_table(json.loads(RECORD.read_text())["rows"])
        return
    bench = Benchmark("vlm_matrix", args)
    names = args.only or list(vlm_zoo.ZOO)[: 3 if args.quick else None]
    good = total = 0
    for name in names:
        command = [sys.executable, __file__, "--child", name, *args.columns]
        done = subprocess.run(
            command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1")
        )
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
        heard = json.loads(lines[-1])
        bench.row(model=name, **heard["found"])
        print(name, heard["found"], flush=True)
        for trace in heard["traces"].values():
            print(trace, file=sys.stderr, flush=True)
        good += sum(map(holds, heard["found"].values()))
        total += len(heard["found"])
    bench.claim("cells that are right, or refused with the reason", good / total, "== 1")
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], sys.argv[3:])))
    else:
        main()
