"""What packing costs at its boundary, in seconds and in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from _harness import Benchmark, interleave
from _prepacking_model import LONGEST, ROWS, batch_of, decoder

import thresher
from thresher.tools import lengths as length_sets


def boundary(bench: Benchmark, quick: bool, rounds: int) -> None:
    """What plan, pack and unpack cost beside the body, with logits and a cache to hand back and without."""
    model = decoder(2 if quick else 4)
    batch = batch_of(length_sets.draw("long-tail", ROWS, LONGEST))
    cases = {
        "logits and KV cache, padded": (model, {}),
        "logits packed, no cache": (model, {"outputs": "packed"}),
        "hidden states, padded": (model.model, {}),
    }
    for name, (module, options) in cases.items():
        extra = {} if name.startswith("logits and") else {"use_cache": False}
        ours = thresher.compile(
            module, {**batch, **extra}, dynamic=True, prepack=options or True, verify=False
        )
        ours(**batch, **extra)
        calls = {
            "call": functools.partial(ours, **batch, **extra),
            "body": _body_alone(ours, {**batch, **extra}),
        }
        times = interleave(calls, rounds=rounds, warmup=1)
        share = times["call"].cpu_min / times["body"].cpu_min - 1
        bench.row(
            lengths="long-tail", form=f"boundary: {name}", overhead=round(share, 4), **times["call"].fields()
        )
        bench.claim(f"around the body, of the body's time: {name}", share, "<= 0.02")


def _body_alone(ours: thresher.compiled.Compiled, inputs: dict[str, Any]) -> Callable[[], Any]:
    """The compiled body on the arguments of one call."""
    body, given = ours.sessions[0]._lowered_body(), []
    run = body.run
    body.run = lambda *a: given.append(a) or run(*a)
    ours(**inputs)
    body.run = run
    return functools.partial(run, *given[0])


def memory(bench: Benchmark, quick: bool) -> None:
    """Peak of live bytes during a call, of what PyTorch's allocator hands out, without the weights."""
    model = decoder(2)
    batch = {**batch_of(length_sets.draw("long-tail", ROWS, LONGEST)), "use_cache": False}
    padded = torch.compile(model, backend="inductor", dynamic=True)
    ours = thresher.compile(model, batch, dynamic=True, prepack={"outputs": "packed"}, verify=False)
    peaks = {}
    with torch.no_grad():
        for name, call in (("padded compile", padded), ("ours", ours)):
            call(**batch)
            peaks[name] = _peak(lambda call=call: call(**batch))
            bench.row(lengths="long-tail", form=f"memory: {name}", peak_mb=round(peaks[name] / 2**20, 2))
    mask = batch["attention_mask"]
    share = float(mask.sum()) / mask.numel()
    bench.claim(
        "peak activation memory over padded, of T / (B*S)",
        peaks["ours"] / peaks["padded compile"] / share,
        "<= 1.1",
    )


def _peak(call: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
