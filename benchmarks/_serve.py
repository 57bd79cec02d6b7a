"""The part `serve` of compose.py: SmolLM2-135M answers a mixed-length batch, prefill and greedy decode steps."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from _harness import Benchmark, alone
from rich.console import Console

import thresher
from thresher import auto, backend, memory, models, sessions
from thresher.recipe import Recipe

BUDGET = 0.01
PADDED, EAGER = "Inductor, padded", "eager, padded"
NARROW = "Inductor, padded, the whole model in bf16"
RECIPES = ("exact", "serve-bf16", "serve-latency")
KEPT = "Inductor, padded, freed memory kept"
RUNS = 2


def serve(b: Benchmark, args: Any) -> None:
    """Each form by itself, with Dynamo's memory emptied before it: forms of one model share its code cache.

    A form's time is its quickest prefill and, step by step, its quickest decode step out of RUNS runs.
    """
    rows, longest, steps = (4, 64, 4) if args.quick else (16, 512, 64)
    model, tokenizer = models.smollm2()
    batch = models.mixed_length_batch(tokenizer, rows, max_len=longest, padding_side="left")
    real = int(batch["attention_mask"].sum())
    judged_on = models.mixed_length_batch(tokenizer, 4, max_len=96, padding_side="left")
    loss = auto._metric("kl", model, judged_on)
    losses, total, prefill, tokens = {}, {}, {}, {}
    chosen = args.forms or [*RECIPES, KEPT, NARROW, "torchao int8 dynamic", "torchao int8 weights"]
    for name in [EAGER, PADDED, *chosen]:
        torch._dynamo.reset()
        try:
            call, losses[name] = _form(name, model, loss, judged_on)
        except Exception as reason:  # what torchao cannot do here is a row, not the end of the benchmark
            b.not_measured(
                f"SmolLM2, {name}", f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}."
            )
            continue
        if losses[name] > BUDGET and name in RECIPES and not args.quick:
            b.row(part="serve", form=f"{name} (not timed: outside 1 %)", loss=losses[name])
            continue
        started = time.time()
        generate(call, batch, 2)  # compiles prefill and decode
        compiled = time.time() - started
        before = _packed()
        with alone(args.lock):
            runs = [generate(call, batch, steps) for _ in range(RUNS)]
        best = {
            "prefill": min(r["prefill"] for r in runs),
            "decode": sum(map(min, zip(*(r["steps"] for r in runs)))),
        }
        tokens[name], total[name], prefill[name] = runs[0]["tokens"], sum(best.values()), best["prefill"]
        b.row(part="serve", form=name, prefill_s=round(best["prefill"], 2), decode_s=round(best["decode"], 2),
              total_s=round(total[name], 2), packed_calls=_packed() - before, loss=losses[name],
              first_calls_s=round(compiled, 1),
              same_tokens=tokens[name].equal(tokens[EAGER]), steps=steps, rows=rows,
              real_share=round(real / batch["input_ids"].numel(), 3))  # fmt: skip
        _claims(b, f"SmolLM2, prefill of {rows} mixed rows and {steps} decode steps", total, prefill, losses)
        b.finish(Console(quiet=True))  # what there is so far


def _claims(b: Benchmark, what: str, total: dict[str, float], prefill: dict[str, float], losses: Any) -> None:
    """The claims as far as forms were run."""
    b.claims = [c for c in b.claims if not c["claim"].startswith(what)]
    b.missing = [m for m in b.missing if not m["claim"].startswith(what)]
    if PADDED not in total:
        return
    ours = [n for n in total if n in RECIPES]
    name = f"{what}: best recipe within 1 %"
    if not ours:
        b.not_measured(name, "No recipe was run, or none stayed within 1 %.")
        return
    best_of = min(ours, key=total.__getitem__)
    b.claim(f"{name} over padded Inductor", total[PADDED] / total[best_of], ">= 3")
    b.claim(f"{what}: its prefill alone over padded Inductor", prefill[PADDED] / prefill[best_of], ">= 3")
    b.claim(f"{name} over padded eager", total[EAGER] / total[best_of], ">= 1")
    if "exact" in total:
        b.claim(f"{what}: exact recipe over padded Inductor", total[PADDED] / total["exact"], ">= 1")
    if KEPT in total:
        b.claim(f"{name} over padded Inductor with freed memory kept", total[KEPT] / total[best_of], ">= 1")
    if NARROW in total and losses[NARROW] <= BUDGET:
        b.claim(f"{name} over padded Inductor of the model in bf16", total[NARROW] / total[best_of], ">= 1")
    others = [total[n] for n in total if n.startswith("torchao") and losses[n] <= BUDGET]
    if others:
        b.claim(f"{name} over torchao's best within 1 %", min(others) / total[best_of], ">= 1")
    else:
        b.not_measured(
            f"{name} over torchao's best within 1 %", "No form of torchao was run, or none stayed within 1 %."
        )


def _form(name: str, model: Any, loss: Any, judged_on: dict[str, torch.Tensor]) -> tuple[Any, float]:
    """A way of calling the model, and its KL to the fp32 model on `judged_on`."""
    if name == EAGER:
        return model, 0.0
    if name == KEPT:
        memory.keep()
    if name in (PADDED, KEPT):
        return torch.compile(model, dynamic=True), 0.0
    if name == NARROW:
        own = models.smollm2()[0].to(torch.bfloat16)
        return torch.compile(own, dynamic=True), loss(own)
    if name.startswith("torchao"):
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        own = models.smollm2()[0]
        quantize_(
            own, Int8WeightOnlyConfig() if "weights" in name else Int8DynamicActivationInt8WeightConfig()
        )
        return torch.compile(own, dynamic=True), loss(own)
    recipe = Recipe.of(name)
    judged = loss(thresher.compile(model, judged_on, recipe, target="reference"))
    torch._dynamo.reset()
    options = {
        "recipe": dataclasses.replace(recipe, verify=False)
    }  # `judged` is the check; this one takes minutes
    return torch.compile(model, dynamic=True, backend=backend.thresher_backend, options=options), judged


def _packed() -> int:
    """Calls so far that ran packed."""
    return sum(s.counters.packed for s in sessions.recent())


def generate(call: Any, batch: dict[str, torch.Tensor], steps: int) -> dict[str, Any]:
    """CPU seconds of a prefill and of greedy decode steps, with the cache that the model hands back; the tokens."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    mask = batch["attention_mask"]
    with torch.no_grad():
        start = clock()
        out = call(input_ids=batch["input_ids"], attention_mask=mask, use_cache=True, logits_to_keep=1)
        prefill = clock() - start
        tokens = [out.logits[:, -1:].argmax(-1)]
        times = []
        for _ in range(steps):
            start = clock()
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            out = call(input_ids=tokens[-1], attention_mask=mask, position_ids=positions,
                       past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)  # fmt: skip
            tokens.append(out.logits[:, -1:].argmax(-1))
            times.append(clock() - start)
        return {"prefill": prefill, "steps": times, "tokens": torch.cat(tokens, 1)}
