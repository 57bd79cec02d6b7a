"""What every benchmark shares: its arguments, fair timing, and a record that says on what it was measured.

    args = arguments(__doc__)
    bench = Benchmark("prepacking", args)
    times = interleave({"padded": padded, "ours": ours}, rounds=3 if args.quick else 10)
    bench.row(lengths="long-tail", form="ours", **times["ours"].fields())
    bench.claim("E on long-tail", value=0.94, target=">= 0.90")
    bench.not_measured("E on a GPU", "This machine has no GPU.")
    bench.finish()

Run a benchmark as `python benchmarks/NAME.py [--quick] [--json PATH]`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import machine, versions
from rich.console import Console
from rich.table import Table

# options that name files
_PLACES = ("json", "llama", "lock", "log", "more", "openvino", "ray", "state", "vllm")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


def arguments(
    description: str | None, add: Callable[[argparse.ArgumentParser], Any] | None = None
) -> argparse.Namespace:
    """The command line every benchmark has: `quick`, `json` and `threads`. `add` may give it more.

    Sets torch's thread count, since timings with a different one cannot be compared.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and rounds: under 5 minutes on 2 cores"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the record there")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; default 1")
    if add is not None:
        add(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over all rounds.

    CPU time is the calling thread's, or the whole process's when torch runs more than one thread. On a
    machine that others use too, the minimum of CPU time is the steadiest figure; on a GPU only wall time
    means something.
    """

    cpu_min: float
    cpu_median: float
    wall_min: float
    wall_median: float
    rounds: int
    calls: int

    def fields(self) -> dict[str, float]:
        """The four times, named for a row."""
        times = {k: v for k, v in asdict(self).items() if k not in ("rounds", "calls")}
        return {f"{name}_ms": round(value, 4) for name, value in times.items()}


@contextlib.contextmanager
def alone(path: str | Path | None) -> Iterator[None]:
    """Hold a lock file, where several benchmarks share a machine; nothing where none is named."""
    if not path:
        yield
        return
    import fcntl

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def interleave(
    forms: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    warmup: int = 2,
    least_ms: float = 20.0,
    device: str | torch.device = "cpu",
) -> dict[str, Timing]:
    """Time the forms in turn, round by round, so that drift of the machine meets all of them alike.

    Args:
        forms: name -> function of no arguments. What they compute is the caller's to compare.
        rounds: how often each is timed.
        warmup: calls of each before the first round; compilation happens there.
        least_ms: a form that is quicker is called several times per timing, to fill this many.
        device: on "cuda" every reading waits for the device.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    cpu_clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
    calls = {}
    for name, form in forms.items():
        for _ in range(max(1, warmup)):
            wait()
            start = time.perf_counter()
            form()
            wait()
            spent = time.perf_counter() - start
        calls[name] = max(1, min(1000, round(least_ms / 1e3 / max(spent, 1e-7))))
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    wall: dict[str, list[float]] = {name: [] for name in forms}
    names = list(forms)
    for turn in range(rounds):
        shift = turn % len(names)  # each form is first as often as the others: a cold cache is shared out
        for name in names[shift:] + names[:shift]:
            form, count = forms[name], calls[name]
            wait()
            wall_start, cpu_start = time.perf_counter(), cpu_clock()
            for _ in range(count):
                form()
            wait()
            cpu[name].append((cpu_clock() - cpu_start) / count * 1e3)
            wall[name].append((time.perf_counter() - wall_start) / count * 1e3)
    return {
        name: Timing(
            min(cpu[name]),
            statistics.median(cpu[name]),
            min(wall[name]),
            statistics.median(wall[name]),
            rounds,
            calls[name],
        )
        for name in names
    }


class Benchmark:
    """Collects rows and claims; `finish` prints them and writes the JSON record."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        self.rows: list[dict[str, Any]] = []
        self.claims: list[dict[str, Any]] = []
        self.missing: list[dict[str, str]] = []
        self._start = time.time()

    def row(self, **fields: Any) -> None:
        """One line of the table. Rows may have different fields."""
        self.rows.append(fields)

    def claim(self, claim: str, value: float, target: str) -> bool:
        """Record, and return, whether `value` meets `target`, e.g. ">= 0.90". NaN meets nothing."""
        parsed = re.fullmatch(r"(>=|<=|>|<|==)\s*([-+.\deE]+)", target.strip())
        if parsed is None:
            raise ValueError(
                f"target: got {target!r}; accepted is a comparison and a number, e.g. '>= 0.90'."
            )
        holds = bool(_OPERATORS[parsed[1]](value, float(parsed[2])))
        self.claims.append({"claim": claim, "value": value, "target": target, "holds": holds})
        return holds

    def not_measured(self, claim: str, reason: str) -> None:
        """A claim that this machine cannot test, and why; of places on it only the last part is kept."""
        told = re.sub(
            r"(?<!\S)\(?(?:/[\w.+-]+){2,}",
            lambda m: "(" * m[0].startswith("(") + m[0].rsplit("/", 1)[1],
            reason,
        )
        self.missing.append({"claim": claim, "reason": told})

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        return {
            "benchmark": self.name,
            "command": _command(),
            "quick": self.args.quick,
            "threads": torch.get_num_threads(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._start)),
            "seconds": round(time.time() - self._start, 1),
            "machine": machine(),
            "versions": versions(),
            "rows": self.rows,
            "claims": self.claims,
            "not_measured": self.missing,
        }

    def finish(self, console: Console | None = None) -> None:
        """Print the tables; write the record where `--json` says."""
        console = console or Console()
        for table in (_rows_table(self.name, self.rows), _claims_table(self.claims, self.missing)):
            if table.row_count:
                console.print(table)
        record = self.save()
        console.print(f"{record['machine']['cpu']}, {record['threads']} thread(s), {record['seconds']} s")
        if self.args.json:
            console.print(f"Wrote {self.args.json}")

    def save(self) -> dict[str, Any]:
        """The record so far, written where `--json` says: what was measured stays, should the next part fail."""
        record = self.record()
        if self.args.json:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            self.args.json.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
        return record


def _command() -> str:
    """What was typed, less the places where things lie on this machine: a record tells nobody of those."""
    root, words, skip = Path(__file__).resolve().parents[1], ["python"], False
    for word in sys.argv:
        path = Path(word).resolve()
        if word.startswith("--"):
            skip = word.removeprefix("--") in _PLACES
        if not skip:
            words.append(
                str(path.relative_to(root)) if os.sep in word and path.is_relative_to(root) else word
            )
    return " ".join(words)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        numeric = all(isinstance(row.get(column, 0), (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_show(row[column]) if column in row else "" for column in columns))
    return table


def _claims_table(claims: Sequence[Mapping[str, Any]], missing: Sequence[Mapping[str, str]]) -> Table:
    table = Table("claim", "value", "target", "holds", title="claims")
    for claim in claims:
        verdict = "[green]yes[/]" if claim["holds"] else "[red]no[/]"
        table.add_row(claim["claim"], _show(claim["value"]), claim["target"], verdict)
    for claim in missing:
        table.add_row(claim["claim"], "", claim["reason"], "[yellow]not measured[/]")
    return table


def _plain(value: Any) -> Any:
    """NaN and infinity become text: JSON has neither, and many a reader stops at them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
