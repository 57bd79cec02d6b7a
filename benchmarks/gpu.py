"""Every claim about GPUs, in seven minutes on one card: most important first, written down as it is found.

    python benchmarks/gpu.py --json gpu.json          # on a card
    python benchmarks/gpu.py --dry                    # every row on a CPU, tiny, under Triton's interpreter
    python benchmarks/gpu.py --only "products,varlen" --minutes 3

A row that fails is recorded with its error and the next one begins; a row that would not fit into what is left of the
time is `not_measured`; a row that hangs ends the run, with all that was found before. Each row gives its share of the
roofline, from the bandwidth and the rate of products that this card is measured at first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import threading
import time
from typing import Any

DRY = "--dry" in sys.argv
if DRY:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from _gpu_card import Card  # noqa: E402
from _gpu_rows import ROWS, Row  # noqa: E402
from _harness import Benchmark, _plain, arguments  # noqa: E402

from thresher.kernels import catalog  # noqa: E402

GRACE = 15.0  # seconds in which a row that is over its time may still end by itself


def main() -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dry", action="store_true", help="every row on a CPU, with tiny sizes")
        parser.add_argument("--minutes", type=float, default=7.0, help="all the time there is")
        parser.add_argument("--only", default="", help="parts of rows' names, with commas")

    args = arguments(__doc__, more)
    if not args.dry and not torch.cuda.is_available():
        print("torch sees no CUDA GPU; --dry walks every row on a CPU.", file=sys.stderr)
        return 2
    catalog.load()
    bench = Benchmark("gpu", args)
    card = Card(args.dry)
    deadline = time.monotonic() + 60 * args.minutes
    watch = _end_at(deadline + GRACE, bench)
    bench.row(row="card", **card.measure())
    wanted = [word.strip() for word in args.only.split(",") if word.strip()]
    for row in ROWS:
        if wanted and not any(word in row.name for word in wanted):
            continue
        left = deadline - time.monotonic()
        if not args.dry and left < row.needs:
            bench.not_measured(row.name, f"{left:.0f} s were left, and it takes about {row.needs:.0f} s.")
            continue
        measure(row, card, bench)
        write(bench)
    watch.cancel()
    bench.finish()
    failed = [r["row"] for r in bench.rows if "failed" in r]
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def measure(row: Row, card: Card, bench: Benchmark) -> None:
    """One row: its lines, and its claims as their geometric mean; an error is a line too."""
    started, found = time.monotonic(), []
    try:
        for line in row.run(card):
            found.append(line)
            bench.row(row=row.name, **line)
            write(bench)
    except Exception as reason:  # the next row is worth as much
        bench.row(row=row.name, failed=f"{type(reason).__name__}: {reason}"[:400])
        if not card.dry:
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
    bench.row(row=row.name, seconds=round(time.monotonic() - started, 1))
    for figure, target in row.claims:
        values = [line[figure] for line in found if figure in line]
        name = f"{row.name}: {figure}, geometric mean"
        if card.dry or not values:
            bench.not_measured(
                name, "A dry run has no times." if card.dry else "The row gave no such figure."
            )
        else:
            bench.claim(name, math.exp(sum(map(math.log, values)) / len(values)), target)


def write(bench: Benchmark) -> None:
    """What there is so far, whole or not at all."""
    path = bench.args.json
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(_plain(bench.record()), indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def _end_at(moment: float, bench: Benchmark) -> Any:
    """End the process at a moment, whatever hangs, with what there is written down."""

    def end() -> None:
        bench.not_measured("what was running, and all behind it", "It took longer than the time there was.")
        write(bench)
        os._exit(3)

    timer = threading.Timer(max(1.0, moment - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    sys.exit(main())
