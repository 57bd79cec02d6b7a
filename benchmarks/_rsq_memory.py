"""Time and peak memory of calibrating and quantising SmolLM2 to 3 bits: a part of benchmarks/rsq.py.

A process of its own, with nothing in it but the model and what `thresher.quantize` needs: no judge, no reference
logits. Two peaks are told apart: of the whole process, and above what Python, torch and the imports take
before a model is loaded. `--pieces` stops after so many layers, which finds the peak but not the time.

    python benchmarks/_rsq_memory.py --sequences 128 --threads 2 --json benchmarks/results/rsq_memory.json
"""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Iterable
from typing import Any

import torch
from _harness import Benchmark, arguments

from thresher import RSQ, quantize
from thresher.passes.rsq.quantizer import driver as rsq_driver
from thresher.tools import models

LENGTH = 512


def peak() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--sequences", type=int, default=128)
        parser.add_argument(
            "--pieces", type=int, default=0, help="stop after so many layers; 0: none left out"
        )

    args = arguments(__doc__, add)
    bench = Benchmark("rsq_memory", args)
    baseline = peak()
    model, tokenizer = models.smollm2()
    held = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    if args.pieces:
        whole = rsq_driver.progress

        def some(items: Iterable[Any], *rest: Any) -> Any:
            return itertools.islice(whole(items, *rest), args.pieces)

        rsq_driver.progress = some  # type: ignore[assignment]
    texts = list(models.texts())
    loaded = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    config = RSQ(bits=3)
    quantize(model, texts, config, tokenizer=tokenizer, sequences=args.sequences, length=LENGTH)
    seconds, spent, most = time.perf_counter() - wall, time.process_time() - cpu, peak()
    tokens = f"{args.sequences} x {LENGTH} tokens"
    part = f", {args.pieces} of {len(model.model.layers)} layers" if args.pieces else ""
    bench.row(part="memory", tokens=args.sequences * LENGTH, pieces=args.pieces or len(model.model.layers),
              threads=torch.get_num_threads(), model_mb=round(held, 1), imports_mb=round(baseline, 1),
              loaded_mb=round(loaded, 1), peak_mb=round(most, 1), wall_s=round(seconds, 1),
              cpu_s=round(spent, 1))  # fmt: skip
    bench.claim(f"peak of the process over the fp32 model, {tokens}{part}", most / held, "<= 2.5")
    bench.claim(
        f"peak without Python and its imports over the fp32 model, {tokens}{part}",
        (most - baseline) / held,
        "<= 2.5",
    )
    if args.pieces or args.sequences < 128:
        left_out = f"It stopped after {args.pieces} layer(s)" if args.pieces else f"It was run on {tokens}"
        bench.not_measured(
            "calibration and quantization of 128 x 512 tokens in 12 minutes on 2 cores",
            f"{left_out}, in {seconds:.0f} s by the clock and {spent:.0f} s of CPU time; other work had the cores.",
        )
    else:
        bench.claim("minutes to calibrate and quantize 128 x 512 tokens", seconds / 60, "<= 12")
    bench.finish()


if __name__ == "__main__":
    main()
