"""Whole-model decoding of SmolLM2: RSQ 4 bits against eager bf16 and fp32 Inductor, one token a step."""

from __future__ import annotations

import time
from typing import Any

import torch
from _harness import Benchmark, interleave

import thresher
from thresher.files import cache_dir
from thresher.tools import models

PAST = 128


def decode(bench: Benchmark, quick: bool, locked: Any) -> None:
    """Time one decode step on a cache of PAST tokens; the codes come from little calibration data."""
    from transformers import DynamicCache

    full, tokenizer = models.smollm2()
    half = models.smollm2(torch.bfloat16)[0]
    path = cache_dir() / "benchmarks" / "rsq-decode-4bit.safetensors"
    if not path.exists():
        texts = list(models.texts()[:60])
        config = thresher.RSQ(bits=4, method="nearest")  # speed does not depend on the codes
        low = thresher.quantize(full, texts, config, tokenizer=tokenizer, sequences=1, length=64)
        low.save(path)
    options = {"rsq": {"budget": 10.0}, "stats": str(path)}
    prompt = tokenizer(" ".join(models.texts()[:20]), return_tensors="pt")["input_ids"][:, :PAST]

    def step_of(model: Any, call: Any) -> Any:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
        token = prompt[:, -1:]

        def step() -> Any:
            with torch.no_grad():
                logits = call(token, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)  # each step is the same step
            return logits

        return step

    torch._dynamo.reset()
    inductor = torch.compile(full, dynamic=False)
    ours = torch.compile(full, backend="thresher", options=options, dynamic=False)
    forms = {
        "eager bf16": step_of(half, half),
        "fp32 Inductor": step_of(full, inductor),
        "RSQ 4 bits, fp32 activations": step_of(full, ours),
    }
    started = time.perf_counter()
    expected, actual = forms["fp32 Inductor"](), forms["RSQ 4 bits, fp32 activations"]()
    report = next(r for r in reversed(thresher.reports()) if r.rewritten)
    (account,) = [p for p in report.passes if p.name == "rsq"]
    bench.row(part="decode", form="compile", seconds=round(time.perf_counter() - started, 1),
              rewritten=len(account.rewritten), error=float((expected - actual).norm() / expected.norm()))  # fmt: skip
    with locked():
        times = interleave(forms, rounds=5 if quick else 9)
    for name, timing in times.items():
        bench.row(part="decode", form=name, past=PAST, **timing.fields())
    mine = times["RSQ 4 bits, fp32 activations"].cpu_min
    bench.claim(
        "whole-model decode: time of eager bf16 over ours", times["eager bf16"].cpu_min / mine, ">= 1.5"
    )
    bench.claim(
        "whole-model decode: time of fp32 Inductor over ours", times["fp32 Inductor"].cpu_min / mine, ">= 1.2"
    )
    x = torch.randn(1, 1, 1536)
    signs = torch.ones(1536)
    hadamard = interleave({"h": lambda: torch.ops.thresher.hadamard(x, signs, 1536)}, rounds=9)["h"].cpu_min
    layers = len(full.model.layers)
    bench.row(part="decode", form="hadamard 1536", cpu_min_ms=hadamard)
    bench.claim("Hadamard transforms' share of a decode step", layers * hadamard / mine, "<= 0.03")
    bench.not_measured("whole-model decode on a GPU", "This machine has no GPU.")
