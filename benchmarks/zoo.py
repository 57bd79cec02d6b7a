"""Every model class of transformers' auto mappings: does it run, does it pack, what is covered, what is said.

    python benchmarks/zoo.py --quick                            # the fixed sample of 40 classes
    python benchmarks/zoo.py --state zoo.jsonl --json zoo.json  # all; goes on where it was stopped
    python benchmarks/zoo.py --kinds MODEL_FOR_CAUSAL_LM --state zoo.jsonl
    python benchmarks/zoo.py --document                         # write docs/structure.md's table from the record

Each class is a row: eager, torch.compile without Inductor, Thresher's default recipe on the reference target with right
and left padding in fp32, and in bf16, NVFP4 and RSQ. A process runs class after class and is started again where one
ends it or takes too long. --state holds rows as they come, one JSON a line; rows there are not run again.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import Benchmark, arguments
from _zoo_models import classes
from _zoo_sample import SAMPLE

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "structure.md"
MARKS = ("<!-- zoo: written by benchmarks/zoo.py --document -->", "<!-- end of zoo -->")
MIXTURES = (
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "Llama4ForCausalLM",
)
RAN = ("right", "crashes", "differs")
SECONDS = 240  # of the processor, for one class; whoever takes longer is ended


def rows_in(state: Path) -> dict[str, dict[str, Any]]:
    """The rows that a file of partial results holds, by class; a line that was cut short is none."""
    found = {}
    for line in state.read_text().splitlines() if state.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["class"]] = row
    return found


def work(names: list[str], state: Path, checks: tuple[str, ...]) -> None:
    """Run classes one after another and write each row as soon as it is there."""
    import _zoo_run

    gc.freeze()  # what was imported is not looked through again at each collection
    for name in names:
        print(name, flush=True)  # the parent watches this line's age
        row = _zoo_run.run(name, checks)
        with state.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _missing(names: list[str], state: Path) -> list[str]:
    known = rows_in(state)
    return [n for n in names if n not in known]


def _worked(pid: int) -> float:
    """Seconds of the processor that a process took; of the clock where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sweep(names: list[str], state: Path, checks: tuple[str, ...]) -> None:
    """Have every class that the file has no row of run in a process of its own kind, and write one for those that die."""
    while True:
        left = _missing(names, state)
        if not left:
            return
        command = [
            sys.executable,
            __file__,
            "--work",
            ",".join(left),
            "--checks",
            ",".join(checks),
            "--state",
            str(state),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known, since = len(left), _worked(process.pid)
        while process.poll() is None:
            time.sleep(1)
            now = len(_missing(left, state))
            if now != known:
                known, since = now, _worked(process.pid)
                print(f"{len(names) - now} of {len(names)}", flush=True)
            if _worked(process.pid) - since > SECONDS:
                process.kill()
                process.wait()
        first = next(iter(_missing(left, state)), None)
        if first is not None:
            how = (
                f"took more than {SECONDS} s"
                if process.returncode == -9
                else f"ended the process ({process.returncode})"
            )
            with state.open("a") as file:
                file.write(json.dumps({"class": first, "outcome": "crashes", "reason": f"It {how}."}) + "\n")


def claims(bench: Benchmark, rows: list[dict[str, Any]]) -> None:
    """The record's claims from its rows."""
    ran = [r for r in rows if r["outcome"] in RAN]
    wrong = [r["class"] for r in ran if r["outcome"] != "right"]
    bench.claim(
        "classes that run under torch.compile and crash, differ or raise under thresher", len(wrong), "<= 0"
    )
    text = [r for r in ran if r.get("text")]
    if text:
        share = sum(r.get("packed", False) for r in text) / len(text)
        bench.claim("share of classes with text and padding that pack", share, ">= 0.85")
    whole = [r for r in ran if "unaccounted" in r]
    if whole:
        share = sum(not r["unaccounted"] for r in whole) / len(whole)
        bench.claim("share of classes whose every matrix is rewritten or in a Miss", share, ">= 1.0")

    for method in ("nvfp4", "rsq"):
        shares = [r.get(f"{method}_beside_kept") for r in rows if r["class"] in MIXTURES]
        claim = f"{method}: least share of weights covered in {len(MIXTURES)} mixtures, head and routers kept"
        if len(shares) == len(MIXTURES) and None not in shares:
            bench.claim(claim, min(shares), ">= 0.98")
        else:
            bench.not_measured(claim, f"The check {method} was not run on all of {', '.join(MIXTURES)}.")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as docs/structure.md shows them: counts, and a line for each class of the sample, with what was packed,
    covered and said."""
    ran = [r for r in rows if r["outcome"] in RAN]
    text = [r for r in ran if r.get("text")]
    rest = len(rows) - len(ran)
    lines = [
        f"{len(ran)} classes were run so far: {sum(r['outcome'] == 'right' for r in ran)} right, "
        f"{sum(r['outcome'] != 'right' for r in ran)} not. Of {len(text)} that take ids and a padding mask "
        f"{sum(bool(r.get('packed')) for r in text)} pack. Of {rest} more no small model was made that runs eagerly.",
        "",
        "| class | packed | NVFP4 covers | why not, in the report's words |",
        "| --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda r: r["class"]):
        if "prepack" not in row or row["class"] not in SAMPLE:
            continue
        covered = row.get("nvfp4_coverage")
        shown = "" if covered is None else f"{covered:.0%}"
        reason = "" if row["packed"] else row["prepack"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {row['class']} | {'yes' if row['packed'] else 'no'} | {shown} | {reason} |")
    return "\n".join(lines)


def document(record: Path = RECORD, page: Path = PAGE) -> str:
    """The page with its table written anew from the record."""
    before, _, rest = page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n\n{table(json.loads(record.read_text())['rows'])}\n\n{MARKS[1]}{after}"


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument(
            "--state", type=Path, help="rows as they come, one JSON a line; read at the start"
        )
        parser.add_argument(
            "--kinds", default="", help="auto mappings, such as MODEL_FOR_CAUSAL_LM; default all"
        )
        parser.add_argument("--only", default="", help="classes by name, with commas")
        parser.add_argument(
            "--checks", default="left,bf16,nvfp4,rsq", help="which checks to run beside the default recipe"
        )
        parser.add_argument(
            "--document", action="store_true", help="write the table in docs/structure.md, and stop"
        )
        parser.add_argument("--work", default="", help="for the worker: classes to run here")

    args = arguments(__doc__, add)
    if args.document:
        PAGE.write_text(document())
        return
    checks = tuple(c for c in args.checks.split(",") if c)
    if args.work:
        work(args.work.split(","), args.state, checks)
        return
    kinds = tuple(k for k in args.kinds.split(",") if k)
    names = [n for n in args.only.split(",") if n] or list(SAMPLE if args.quick else classes(kinds))
    with tempfile.TemporaryDirectory() as folder:
        state = args.state or Path(folder) / "zoo.jsonl"
        sweep(names, state, checks)
        found = rows_in(state)
    bench = Benchmark("zoo", args)
    rows = [found[n] for n in names]
    for row in rows:
        bench.row(**row)
    claims(bench, rows)
    bench.finish()


if __name__ == "__main__":
    main()
