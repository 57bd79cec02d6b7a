"""What a start costs in processes that share Inductor's cache."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from _harness import Benchmark
from _lowering_cells import (
    cut,
)

import thresher
from thresher.lowering.inductor.inductor import Inductor
from thresher.tools import models


def warm(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    """MiniLM in processes that share Inductor's cache: compiled again, loaded from a file, and by torch alone."""
    cache = folder / "cache"
    found: dict[str, dict[str, float]] = {}
    for turn in ("cold", "warm", "loaded, cold", "loaded, warm", "plain torch, cold", "plain torch, warm"):
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "THRESHER_CACHE_DIR": str(
                folder / "kept"
            ),  # what a machine that compiles for the first time knows
        }
        command = [sys.executable, __file__, str(args.layers), turn, str(folder)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            bench.not_measured("second-process warm start", ran.stderr.strip()[-300:])
            return
        found[turn] = json.loads(ran.stdout.strip().splitlines()[-1])
        bench.row(section="warm", model="minilm", form=turn, **found[turn])
    cold, again, loaded = (found[t] for t in ("cold", "warm", "loaded, warm"))
    start = "second-process warm start"
    bench.claim(
        f"{start}: lowering, CPU time over the cold one",
        again["lowering_cpu_s"] / cold["lowering_cpu_s"],
        "<= 0.15",
    )
    bench.claim(
        f"{start}: thresher.load and the first call, CPU time over a cold compile",
        loaded["whole_cpu_s"] / cold["whole_cpu_s"],
        "<= 0.15",
    )
    bench.claim(
        f"{start}: compiled again, CPU time over the cold one",
        again["whole_cpu_s"] / cold["whole_cpu_s"],
        "<= 0.15",
    )
    bench.claim(
        f"{start}: compiled again, CPU time over plain torch.compile's warm start",
        again["whole_cpu_s"] / found["plain torch, warm"]["whole_cpu_s"],
        "<= 1",
    )
    missed = sum(form["misses"] + form["bypasses"] for form in (again, loaded))
    bench.claim(f"{start}: recompiled graphs", missed, "== 0")


def compile_once(layers: int, turn: str, folder: Path) -> None:
    """Print what one start of MiniLM costs; run in a process of its own."""
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    path, batch_path = folder / "minilm.thresher", folder / "minilm.batch"
    if turn.startswith("loaded"):
        batch = torch.load(batch_path)
    else:
        model, tokenizer = models.load("minilm")
        model, batch = cut(model, layers), dict(models.mixed_length_batch(tokenizer, 8, max_len=64))
    lowering, once = [0.0], Inductor._compile

    def timed(self, *arguments):
        start = spent()
        made = once(self, *arguments)
        lowering[0] += spent() - start
        return made

    Inductor._compile = timed  # type: ignore[method-assign]
    start = spent()
    if turn.startswith("loaded"):
        thresher.load(path)(**batch)
    elif turn.startswith("plain"):
        with torch.no_grad():
            torch.compile(model, dynamic=True)(**batch)
    else:
        made = thresher.compile(model, batch, "exact", dynamic=True)
    whole, seen = spent() - start, counters["inductor"]
    if turn == "cold":
        torch.save(batch, batch_path)
        thresher.save(made, path, example_inputs=batch, longest=128)
    print(json.dumps({
        "lowering_cpu_s": lowering[0], "whole_cpu_s": whole, "hits": seen["fxgraph_cache_hit"],
        "misses": seen["fxgraph_cache_miss"], "bypasses": seen["fxgraph_cache_bypass"],
    }))  # fmt: skip


def spent() -> float:
    """CPU seconds of this process and of the children it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


if __name__ == "__main__":
    compile_once(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
