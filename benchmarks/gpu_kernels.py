"""Every Triton kernel in every configuration that models lead to, compiled for GPUs that are not here.

    python benchmarks/gpu_kernels.py --json benchmarks/results/gpu_kernels.json [--only KERNEL --more RECORD] [--for 80,90]

For each: registers, shared memory, blocks and warps a multiprocessor holds, spilled registers, tensor-core instructions,
loads of 16 bytes, 64-bit divisions in loops. A configuration passes when nothing spills, a block fits, tensor cores are
used where it multiplies matrices, some load is wide, and no loop divides 64-bit integers. docs/gpu.md has the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from _harness import Benchmark, arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import launches
import triton_aot as aot


def look(launch: launches.Launch) -> dict[str, Any]:
    """One configuration on one architecture: what it takes, and what is wrong with it."""
    found = launch.compile()
    warps = dict(launch.options).get("num_warps", 4)
    blocks = found.blocks(launch.capability, warps)
    wrong = []
    if found.stack or found.spills:
        wrong.append(f"spills ({found.stack} bytes of stack, {found.spills} accesses)")
    if found.shared > aot.SHARED_MEMORY[launch.capability] or not blocks:
        wrong.append("does not fit")
    if launch.products and not found.mma:
        wrong.append("no tensor-core instruction")
    if launch.wide and not found.wide_loads():
        wrong.append("no load of 16 bytes")
    if found.divisions_in_loops():
        wrong.append(f"{found.divisions_in_loops()} 64-bit divisions in loops")
    return {
        "kernel": f"{launch.operator}: {launch.name}", "configuration": launch.configuration, "sm": launch.capability,
        "registers": found.registers, "shared": found.shared, "blocks": blocks, "warps": blocks * warps,
        "mma": " ".join(found.mma), "wide": found.wide_loads(), "wrong": "; ".join(wrong),
    }  # fmt: skip


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", default="", help="part of an operator's or a kernel's name")
        parser.add_argument("--more", type=Path, help="a record whose rows of other kernels are taken over")
        parser.add_argument("--for", dest="targets", default=",".join(map(str, launches.ARCHITECTURES)))

    args = arguments(__doc__, more)
    bench = Benchmark("gpu_kernels", args)
    for capability in map(int, args.targets.split(",")):
        started, chosen = time.time(), launches.recorded(capability)
        chosen = [c for c in chosen if args.only in f"{c.operator}: {c.name}"]
        if args.quick:
            chosen = list({(c.operator, c.name): c for c in chosen}.values())
        for launch in chosen:
            bench.row(**look(launch))
        print(f"sm_{capability}: {len(chosen)} in {time.time() - started:.0f} s", flush=True)
    if args.more is not None:
        made = {row["kernel"] for row in bench.rows}
        bench.rows += [r for r in json.loads(args.more.read_text())["rows"] if r["kernel"] not in made]
        bench.rows.sort(key=lambda row: (row["sm"], row["kernel"]))
    good = sum(not r["wrong"] for r in bench.rows)
    if bench.rows:
        bench.claim("kernels x configurations x architectures that pass", good / len(bench.rows), "== 1")
    bench.finish()


if __name__ == "__main__":
    main()
