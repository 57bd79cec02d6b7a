"""The benchmark of precision, timed: MiniLM beside OpenVINO, low-bit products, and what proofs take of a compilation."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, interleave
from _precision_models import each, texts
from _prepacking_model import ROWS, batch_of, decoder
from prepacking import bound

import thresher
from thresher.formats import bitpack
from thresher.kernels import native
from thresher.kernels.nvfp4.quantize import quantize
from thresher.tools import lengths as length_sets
from thresher.tools import models

AMX = "amx_bf16" in native.cpu_features()


NO_AMX = "This processor has no AMX."


RECORD = Path(__file__).parent / "results" / "nvfp4.json"


def minilm(bench: Benchmark, args: Namespace) -> None:
    """Texts a second in bf16."""
    count = 64 if args.quick else 384
    orders = {order: texts(count, order) for order in ("arrival", "sorted")}
    model = models.minilm()[0].to(torch.bfloat16)
    ours = thresher.compile(model, orders["arrival"][0], "exact", target=args.target, dynamic=True)
    forms = {f"eager {order}": functools.partial(each, model, given) for order, given in orders.items()}
    forms |= {f"thresher {order}": functools.partial(each, ours, given) for order, given in orders.items()}
    times = interleave(forms, rounds=3, warmup=1, least_ms=0)
    speeds = {name: count / t.cpu_min * 1e3 for name, t in times.items()}
    speeds |= {f"openvino {k}": count / s for k, s in _openvino(bench, args, orders).items()}
    for name, speed in speeds.items():
        bench.row(part="minilm", form=name, texts=count, target=args.target, texts_a_second=round(speed, 1))
    for against, rival in (("eager bf16", "eager sorted"), ("OpenVINO bf16", "openvino bf16 sorted")):
        claim = f"MiniLM bf16, arrival order, one core: over {against} sorted by length"
        if rival not in speeds:
            bench.not_measured(claim, "--openvino names no Python that has it.")
        elif AMX:
            bench.claim(claim, speeds["thresher arrival"] / speeds[rival], ">= 2.0")
        else:
            bench.claim(f"{claim}, without AMX", speeds["thresher arrival"] / speeds[rival], ">= 1.0")
            bench.not_measured(claim, NO_AMX)
    gained = speeds["thresher arrival"] / speeds["eager arrival"]
    bench.claim("MiniLM bf16, arrival order, one core: over eager bf16 in the same order", gained, ">= 1.3")


def _openvino(bench: Benchmark, args: Namespace, orders: dict[str, Any]) -> dict[str, float]:
    if args.openvino is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.pt"
        torch.save(orders, path)
        script = str(Path(__file__).parent / "_openvino.py")
        done = subprocess.run([args.openvino, script, str(path)], capture_output=True, text=True)
    if done.returncode:
        bench.not_measured(
            "OpenVINO", f"It failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}."
        )
        return {}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    bench.row(part="minilm", form=f"openvino {found['version']}")
    return dict(found["seconds"])


def share(bench: Benchmark, args: Namespace) -> None:
    """E in bf16: the speed-up over the padded program, of what FLOPs allow."""
    layers = 2
    model = decoder(layers).to(torch.bfloat16)
    names = ("long-tail", "one-long") if args.quick else (
        "long-tail", "one-long", "uniform", "mmlu-like", "alpaca-like", "samsum-like")  # fmt: skip
    drawn = {n: length_sets.draw(n, ROWS, 256 if args.quick else 512) for n in names}
    batches = {n: batch_of(drawn[n]) for n in names}
    first = batches[names[0]]
    ours, padded = (
        thresher.compile(model, first, r, target=args.target, dynamic=True) for r in ("exact", "none")
    )
    reached = []
    for name, batch in batches.items():
        forms = {
            "padded": functools.partial(each, padded, [batch]),
            "ours": functools.partial(each, ours, [batch]),
        }
        times = interleave(forms, rounds=3, warmup=1, least_ms=0)
        best = bound(drawn[name], model, layers)
        gained = times["padded"].cpu_min / times["ours"].cpu_min
        reached.append(gained / best)
        bench.row(
            part="share",
            lengths=name,
            bound=round(best, 2),
            speedup=round(gained, 2),
            E=round(gained / best, 3),
        )
    mean = math.exp(sum(map(math.log, reached)) / len(reached))
    bench.claim(f"E in bf16, geometric mean over {len(names)} length sets", mean, ">= 0.90")


def low_bit(bench: Benchmark, args: Namespace) -> None:
    """Products by weights of four bits."""
    size = 4096
    torch.manual_seed(0)
    weight = (torch.randn(size, size) * 0.02).bfloat16()
    q = quantize(weight)
    words = torch.randint(0, 1 << 30, (size, bitpack.words(size, 4)), dtype=torch.int32)
    scales = torch.rand(size, size // 64) * 1e-3
    known = _recorded()
    targets = {1: ">= 3.5", 8: ">= 1.2", 64: ">= 1.0", 512: ">= 0.95"}
    for rows, target in targets.items():
        x = torch.randn(rows, size).bfloat16()
        forms = {
            "bf16 linear": lambda x=x: torch.nn.functional.linear(x, weight),
            "nvfp4": lambda x=x: torch.ops.thresher.nvfp4_linear(
                x, q.codes, q.block_scales, q.global_scale, None, None, "exact"
            ),
            "4 bits": lambda x=x: torch.ops.thresher.wna16_linear(x, words, scales, None, None, 4, 64),
        }
        with torch.no_grad():
            times = interleave(
                forms, rounds=5 if rows <= 8 else 3, warmup=1, least_ms=100 if rows == 1 else 0
            )
        for form, timing in times.items():
            ratio = times["bf16 linear"].cpu_min / timing.cpu_min
            bench.row(part="low-bit", rows=rows, form=form, over_bf16=round(ratio, 3), **timing.fields())
            if form == "bf16 linear":
                continue
            claim = f"{form} product 4096x4096, {rows} rows: bf16 linear's time over ours"
            if AMX:
                bench.claim(f"{claim}, on AMX", ratio, target)
                continue
            bench.not_measured(f"{claim}, on AMX", NO_AMX)
            bench.claim(f"{claim}, without AMX", ratio, target)
            if form == "nvfp4" and rows in known:
                bench.claim(f"{claim}, of what nvfp4.json holds", ratio / known[rows], ">= 0.95")


def _recorded() -> dict[int, float]:
    """Rows -> speed over bf16 linear in the record of this kind of machine."""
    from _machine import machine

    record = json.loads(RECORD.read_text())
    if {k: record["machine"][k] for k in ("cpu", "isa")} != {k: machine()[k] for k in ("cpu", "isa")}:
        return {}
    rows = (r for r in record["rows"] if r.get("weight") == "4096x4096" and r.get("form") == "nvfp4 exact")
    return {r["rows"]: r["against_bf16"] for r in rows if "against_bf16" in r}
