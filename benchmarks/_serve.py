"""The part `serve` of compose.py: SmolLM2-135M answers a mixed-length batch, prefill and greedy decode steps."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from _harness import Benchmark, alone
from rich.console import Console
from transformers import DynamicCache, StaticCache

import thresher
from thresher import backend, sessions
from thresher.machine import memory
from thresher.recipe import Recipe
from thresher.tools import auto, models

BUDGET = 0.01
PADDED, EAGER = "Inductor, padded", "eager, padded"
NARROW = "Inductor, padded, the whole model in bf16"
RECIPES = ("exact", "serve-bf16", "serve-latency")
KEPT = "Inductor, padded, freed memory kept"
STATIC = ", static cache"
RUNS = 2
MOST_STEPS = 64  # the static cache has room for so many, so that its graph fits every run


def serve(b: Benchmark, args: Any) -> None:
    """Each form by itself, with Dynamo's memory emptied before it: forms of one model share its code cache.

    A form prefills once compiled, and decodes over either kind of cache: the one that the model hands back, which each
    step makes anew, and a static one, which it writes to and into which the prefill's is moved (counted as decoding).
    torchao's tensors take a quarter of an hour to trace with symbolic sizes: its sizes are fixed, so its cache is static.
    A form's time is its quickest prefill and, step by step, its quickest decode step out of RUNS runs.
    """
    rows, longest, steps = (4, 64, 4) if args.quick else (16, 512, 64)
    model, tokenizer = models.smollm2()
    batch = models.mixed_length_batch(tokenizer, rows, max_len=longest, padding_side="left")
    real = int(batch["attention_mask"].sum())
    judged_on = models.mixed_length_batch(tokenizer, 4, max_len=96, padding_side="left")
    loss = auto._metric("kl", model, judged_on)
    losses, total, filling, tokens = {}, {}, {}, None
    chosen = args.forms or [*RECIPES, KEPT, NARROW, "torchao int8 dynamic", "torchao int8 weights"]
    for name in [EAGER, PADDED, *chosen]:
        torch._dynamo.reset()
        try:
            call, steady, lost = _form(name, model, loss, judged_on)
        except Exception as reason:  # what torchao cannot do here is a row, not the end of the benchmark
            b.not_measured(
                f"SmolLM2, {name}", f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}."
            )
            continue
        if lost > BUDGET and name in RECIPES and not args.quick:
            b.row(part="serve", form=f"{name} (not timed: outside 1 %)", loss=lost)
            continue
        started = time.time()
        prefill(call, batch)
        compiled, before = time.time() - started, _packed()
        with alone(args.lock):
            filled, first = min((prefill(call, batch) for _ in range(RUNS)), key=lambda r: r[0])
        packed = _packed() - before
        for cache, step in (("", call), (STATIC, steady))[name.startswith("torchao") :]:
            form = name + cache
            started = time.time()
            decode(step, model, first, batch, 2, cache)
            compiled += time.time() - started
            with alone(args.lock):
                runs = [decode(step, model, first, batch, steps, cache) for _ in range(RUNS)]
            decoded = min(moved for moved, *_ in runs) + sum(map(min, zip(*(times for _, times, _ in runs))))
            said = runs[0][2]
            tokens = said if tokens is None else tokens
            losses[form], filling[form], total[form] = lost, filled, filled + decoded
            b.row(part="serve", form=form, prefill_s=round(filled, 2), decode_s=round(decoded, 2),
                  total_s=round(total[form], 2), packed_calls=packed, loss=lost, first_calls_s=round(compiled, 1),
                  same_tokens=said.equal(tokens), steps=steps, rows=rows,
                  real_share=round(real / batch["input_ids"].numel(), 3))  # fmt: skip
            _claims(
                b, f"SmolLM2, prefill of {rows} mixed rows and {steps} decode steps", total, filling, losses
            )
            b.finish(Console(quiet=True))  # what there is so far


def _claims(
    b: Benchmark, what: str, total: dict[str, float], prefilled: dict[str, float], losses: Any
) -> None:
    """The claims as far as forms were run."""
    b.claims = [c for c in b.claims if not c["claim"].startswith(what)]
    b.missing = [m for m in b.missing if not m["claim"].startswith(what)]
    name = f"{what}: best recipe within 1 %"

    def best(*forms: str) -> str | None:
        """The quickest of these with either cache, if any was timed and is within the budget."""
        ran = [n + c for n in forms for c in ("", STATIC) if n + c in total and losses[n + c] <= BUDGET]
        return min(ran, key=total.__getitem__) if ran else None

    ours = best(*RECIPES)
    if ours is None:
        b.not_measured(name, "No recipe was run, or none stayed within 1 %.")
        return
    torchao = {n.removesuffix(STATIC) for n in total if n.startswith("torchao")}
    for against, forms, target in (
        ("padded Inductor", [PADDED], ">= 3"),
        ("padded eager", [EAGER], ">= 1"),
        ("padded Inductor with freed memory kept", [KEPT], ">= 1"),
        ("padded Inductor of the model in bf16", [NARROW], ">= 1"),
        ("torchao's best within 1 %", torchao, ">= 1"),
    ):
        other = best(*forms)
        if other is not None:
            b.claim(f"{name} over {against}, each with its better cache", total[other] / total[ours], target)
        elif "torchao" in against:
            b.not_measured(f"{name} over {against}", "No form of torchao was run, or none stayed within 1 %.")
    b.claim(f"{what}: its prefill alone over padded Inductor", prefilled[PADDED] / prefilled[ours], ">= 3")
    for cache, kind in (("", "the model's own cache"), (STATIC, "a static cache")):
        if "exact" + cache in total and PADDED + cache in total:
            b.claim(f"{what}: exact recipe over padded Inductor, both with {kind}",
                    total[PADDED + cache] / total["exact" + cache], ">= 1")  # fmt: skip


def _form(name: str, model: Any, loss: Any, judged_on: dict[str, torch.Tensor]) -> tuple[Any, Any, float]:
    """A way of calling the model with sizes that vary, the same with fixed sizes, and its KL to the fp32 model on
    `judged_on`."""
    if name == EAGER:
        return model, model, 0.0
    own, lost, options = model, 0.0, {}
    if name == KEPT:
        memory.keep()
    elif name == NARROW:
        own = models.smollm2()[0].to(torch.bfloat16)
        lost = loss(own)
    elif name.startswith("torchao"):
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        own = models.smollm2()[0]
        quantize_(
            own, Int8WeightOnlyConfig() if "weights" in name else Int8DynamicActivationInt8WeightConfig()
        )
        lost = loss(own)
    elif name != PADDED:
        recipe = Recipe.of(name)
        lost = loss(thresher.compile(model, judged_on, recipe, target="reference"))
        torch._dynamo.reset()
        # `lost` is the check; this one takes minutes
        options = {"backend": backend.thresher_backend,
                   "options": {"recipe": dataclasses.replace(recipe, verify=False)}}  # fmt: skip
    varies = not name.startswith("torchao")
    return torch.compile(own, dynamic=varies, **options), torch.compile(own, dynamic=False, **options), lost


def _packed() -> int:
    """Calls so far that ran packed."""
    return sum(s.counters.packed for s in sessions.recent())


def _clock() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def prefill(call: Any, batch: dict[str, torch.Tensor]) -> tuple[float, tuple[torch.Tensor, list[Any]]]:
    """CPU seconds of a prefill; the first token [rows, 1], and keys and values of each layer."""
    with torch.no_grad():
        start = _clock()
        out = call(**batch, use_cache=True, logits_to_keep=1)
        took = _clock() - start
    return took, (out.logits[:, -1:].argmax(-1), [(y.keys, y.values) for y in out.past_key_values.layers])


def decode(
    call: Any,
    model: Any,
    first: tuple[torch.Tensor, list[Any]],
    batch: dict[str, torch.Tensor],
    steps: int,
    static: str,
) -> tuple[float, list[float], torch.Tensor]:
    """CPU seconds to move the prefill's cache, if into a static one, and of each greedy step; the tokens."""
    mask = batch["attention_mask"]
    rows, width = mask.shape
    token, known = first
    room = width + MOST_STEPS
    cache = StaticCache(config=model.config, max_cache_len=room) if static else DynamicCache()
    full = mask.new_zeros(rows, room)
    full[:, :width] = mask
    tokens, times = [token], []
    with torch.no_grad():
        start = _clock()
        for layer, (keys, values) in enumerate(known):
            cache.update(keys, values, layer)
        moved = _clock() - start if static else 0.0
        for step in range(width, width + steps):
            start = _clock()
            full[:, step] = 1
            seen = full if static else full[:, : step + 1]
            out = call(input_ids=tokens[-1], attention_mask=seen, position_ids=seen.sum(1, keepdim=True) - 1,
                       past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
            tokens.append(out.logits[:, -1:].argmax(-1))
            times.append(_clock() - start)
    return moved, times, torch.cat(tokens, 1)
