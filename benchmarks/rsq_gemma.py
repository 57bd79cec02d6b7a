"""RSQ on a second real decoder, Gemma-3-270M: perplexity and KL to fp32 with and without online rotations.

Norms stand behind Gemma's branches, so that its residual stream cannot be rotated in the weights; the inputs of q, k, v,
gate and up are turned online instead (`rotate_inputs`). Calibration: windows of the first seven tenths of Python's
language reference; held out: windows of the rest. Each window begins with <bos>, as Gemma's texts do.

    python benchmarks/rsq_gemma.py --json benchmarks/results/rsq_gemma.json
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _harness import Benchmark, arguments

from thresher.calibration_data import cut_text
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer.driver import quantise_program
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.sweep import Sweep, bind
from thresher.quantization import _capture
from thresher.tools import models

G64: dict[str, Any] = {"bits": 4, "group_size": 64}
ROWS: dict[str, dict[str, Any]] = {
    "rsq4-g64": G64,
    "rsq4-g64, inputs not turned": {**G64, "rotate_inputs": False},
    "rsq4-g64-asym": {**G64, "symmetric": False},
    "gptq4-g64": {
        **G64,
        "rotate": False,
        "rotate_heads": False,
        "rotate_down": False,
        "importance": "uniform",
    },
    "nvfp4-rsq": {"grid": "nvfp4"},
}
QUICK = ("rsq4-g64",)
LENGTH = 512


def losses(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """fp32 log probabilities [length - 1] of each next token."""
    return torch.log_softmax(logits[:-1].float(), -1).gather(1, window[1:, None])[:, 0]


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--sequences", type=int, default=8)
        parser.add_argument("--rows", nargs="*", choices=list(ROWS))

    args = arguments(__doc__, add)
    bench = Benchmark("rsq_gemma", args)
    model, tokenizer = models.gemma3()
    texts = models.texts()
    cut = len(texts) * 7 // 10
    tokens = cut_text(texts[:cut], tokenizer, args.sequences, LENGTH, 0)
    windows = cut_text(texts[cut:], tokenizer, 4, LENGTH, 1)
    with torch.no_grad():
        expected = [torch.log_softmax(model(w[None], use_cache=False).logits[0].float(), -1) for w in windows]
    reference = _ppl([losses(e, w) for e, w in zip(expected, windows)])
    bench.row(row="fp32", bits=32.0, ppl=round(reference, 3), kl=0.0)
    print(bench.rows[-1], flush=True)
    batches = [Batch({"input_ids": rows}, None, rows) for rows in tokens.split(4)]
    program = _capture(model, batches)
    for name in QUICK if args.quick else args.rows or ROWS:
        config = RSQConfig(**ROWS[name])
        found: dict[str, float] = {}
        wall, cpu = time.perf_counter(), time.process_time()

        def finish(
            sweep: Sweep, found: dict[str, float] = found, wall: float = wall, cpu: float = cpu
        ) -> None:
            found |= {
                "wall_s": round(time.perf_counter() - wall, 1),
                "cpu_s": round(time.process_time() - cpu, 1),
            }
            output = next(o for o in sweep.program.outputs if o is not None)
            actual, apart = [], 0.0
            for window, wanted in zip(windows, expected):
                start = sweep.start(bind(sweep.program, {"input_ids": window[None]}))
                logits = torch.log_softmax(sweep.run(start, {output})[output][0].float(), -1)
                actual.append(losses(logits, window))
                apart += float((wanted.exp() * (wanted - logits)).sum(-1).double().mean()) / len(windows)
            found |= {"ppl": round(_ppl(actual), 3), "kl": round(apart, 5)}

        outcome = quantise_program(program, batches, config, finish=finish)
        weights = sum(8 * r.bytes_after / r.bits for r in outcome.reports.values())
        stored = sum(r.bytes_after for r in outcome.reports.values())
        above = round(100 * (found["ppl"] / reference - 1), 2)
        bench.row(row=name, bits=round(8 * stored / weights, 3), above_fp32_percent=above, **found,
                  exact_fp64=outcome.exact, tokens=tokens.numel(),
                  turned=sum(e.online is not None for e in outcome.plan.edits.values()),
                  missed=[f"{m.site}: {m.reason}" for m in outcome.plan.missed if "rotation" in m.site][:1])  # fmt: skip
        print(bench.rows[-1], flush=True)
    kept = {r["row"]: r for r in bench.rows}
    if "rsq4-g64" in kept:
        bench.claim(
            "Gemma-3-270M, 4 bits in groups of 64: perplexity over fp32's",
            kept["rsq4-g64"]["ppl"] / reference,
            "<= 1.05",
        )
    if "nvfp4-rsq" in kept:
        bench.claim(
            "Gemma-3-270M, RSQ onto NVFP4: perplexity over fp32's",
            kept["nvfp4-rsq"]["ppl"] / reference,
            "<= 1.12",
        )
    bench.finish()


def _ppl(parts: list[torch.Tensor]) -> float:
    return float(torch.cat(parts).double().mean().neg().exp())


if __name__ == "__main__":
    main()
