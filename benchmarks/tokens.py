"""Token pruning and ZipVL: exactness, speed against what FLOPs allow, cost of scoring, the quantized cache,
recompilations, and accuracy on a small vision-language model.

FLOPs count linears, attention and scoring of the decoder layers for all tokens, text included, one
multiply-add as two, causal attention as half of its square. The head is left out of FLOPs and computed for
the last token only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, arguments
from _tokens_model import IMAGE, compiled, llama, prompt, timed
from transformers import DynamicCache

from thresher.passes.transprune.scores import POLICIES
from thresher.runtime.kv.cache import MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy

PARTS: dict[str, Callable[[Benchmark, argparse.Namespace], None]] = {}


def part(function: Callable[[Benchmark, argparse.Namespace], None]) -> Callable[..., None]:
    PARTS[function.__name__] = function
    return function


@part
def exact(bench: Benchmark, args: argparse.Namespace) -> None:
    """A budget of all tokens, for every policy."""
    model, ids = llama(4, 64), prompt(2, 128)
    inputs = dict(input_ids=ids, use_cache=False)
    dense = compiled(model, inputs, "reference", causal_mask=True)(**inputs).logits
    worst = 0.0
    for policy in [p for p in POLICIES if p != "given"]:
        options = dict(policy=policy, stages=((1, 1.0), (2, 1.0)), image_token_id=IMAGE, always=True)
        logits = compiled(model, inputs, "reference", transprune=options)(**inputs).logits
        difference = (logits - dense).abs().max().item()
        bench.row(part="exact", policy=policy, difference=difference)
        worst = max(worst, difference)
    bench.claim("budget 100 %, largest difference over all policies", worst, "== 0")


@part
def speed(bench: Benchmark, args: argparse.Namespace) -> None:
    """Keep 25 % of the image after layer 2 of 8, Inductor, scoring included."""
    tokens = 1024
    model, ids = llama(), prompt(2, tokens)
    inputs = dict(input_ids=ids, use_cache=False, logits_to_keep=1)
    options = dict(stages=((2, 0.25),), image_token_id=IMAGE)
    forms = {
        "dense": compiled(model, inputs, "inductor", causal_mask=True),
        "transprune": compiled(model, inputs, "inductor", transprune=options),
    }
    if not args.quick:
        forms["dense, mask as traced"] = compiled(model, inputs, "inductor", recipe="none")
    calls = {name: (lambda f=form: f(**inputs)) for name, form in forms.items()}
    times = timed(args, calls, 5 if args.quick else 9)
    share = forms["transprune"].report["transprune"].flops_left
    for name in forms:
        flops = share if name == "transprune" else 1.0
        bench.row(part="speed", form=name, tokens=tokens, flops_share=round(flops, 4), **times[name].fields())
    gain = times["dense"].cpu_min / times["transprune"].cpu_min
    bench.claim(
        f"attainable speed-up reached at n = {tokens} ({gain:.2f}x of {1 / share:.2f}x)",
        gain * share,
        ">= 0.94",
    )
    eager = compiled(model, inputs, "reference", transprune=options)(**inputs).logits
    off = (forms["transprune"](**inputs).logits - eager).abs().max() / eager.abs().max()
    bench.claim("Inductor against the reference target, relative", float(off), "<= 1e-3")
    if "dense, mask as traced" in times:
        plain = times["dense, mask as traced"].cpu_min / times["dense"].cpu_min
        bench.claim("causal mask said, not made: speed-up of the dense model", plain, ">= 1.25")


@part
def scoring(bench: Benchmark, args: argparse.Namespace) -> None:
    """The scoring operators alone, against a dense prefill of 8 layers on the reference target."""
    tokens, width = 2048, 256
    model = llama(width=width)
    ids = prompt(1, tokens)
    inputs = dict(input_ids=ids, use_cache=False, logits_to_keep=1)
    dense = compiled(model, inputs, "reference", causal_mask=True)
    ops = torch.ops.thresher
    x, fx = torch.randn(2, 1, tokens, width)
    image = ids == IMAGE
    q, k = torch.randn(1, 8, 128, 32), torch.randn(1, 4, tokens, 32)
    rows = ops.probe_positions(torch.zeros(1, 1).long(), torch.full((1, 1), tokens), 64, 64, 0)

    def transition() -> Any:
        size, cosine = ops.token_transition(x, fx)
        return ops.transition_score(size, cosine, image, "paper")

    calls = {
        "prefill": lambda: dense(**inputs),
        "transition": transition,
        "probes": lambda: ops.probe_scores(q, k, rows, None, 0.2),
        "instruction": lambda: ops.probe_scores(q[:, :, :32], k, rows[:, -32:].contiguous(), None, 0.2),
        "choice": lambda: ops.topk_sorted(x[..., 0], image, None, 512, None),
    }
    times = timed(args, calls, 5)
    for name, timing in times.items():
        bench.row(part="scoring", form=name, tokens=tokens, **timing.fields())
    whole = times["prefill"].cpu_min
    # Dot products that 128 causal rows cannot do without, of a layer's linears and causal attention.
    heads, head_dim, mlp = 8, 32, model.config.intermediate_size
    linears = 2 * tokens * width * (2 * width + 2 * width // 2 + 3 * mlp)
    least = 2 * heads * head_dim * int((rows + 1).sum()) / (linears + 2 * heads * head_dim * tokens**2)
    bench.row(
        part="scoring", form="probes, share of a layer's FLOPs", tokens=tokens, flops_share=round(least, 4)
    )
    bench.claim(
        "TTV of one layer (attention and MLP) per prefill, n = 2048",
        2 * times["transition"].cpu_min / whole,
        "<= 0.01",
    )
    bench.claim(
        f"128 probe rows of one layer per layer's prefill ({least:.1%} of its FLOPs)",
        times["probes"].cpu_min / (whole / 8),
        "<= 0.03",
    )


@part
def zipvl(bench: Benchmark, args: argparse.Namespace) -> None:
    """ZipVL with gather above projections against dense causal attention, Inductor."""
    tokens, layers = 4096, 2
    model = llama(layers)
    ids = prompt(1, tokens)
    inputs = dict(input_ids=ids, use_cache=False, logits_to_keep=1)
    forms = {"dense": compiled(model, inputs, "inductor", causal_mask=True)}
    for gather in ("projections",) if args.quick else ("projections", "attention"):
        forms[gather] = compiled(
            model, inputs, "inductor", zipvl=dict(keep=0.41, gather=gather, image_token_id=IMAGE)
        )
    times = timed(args, {n: (lambda f=f: f(**inputs)) for n, f in forms.items()}, 5)
    for name, form in forms.items():
        share = 1.0
        if name != "dense":
            share = form.report["zipvl"].flops_left
            gain = times["dense"].cpu_min / times[name].cpu_min
            held = form.sessions[-1].extras["realised_tau"].mean().item()
            bench.row(part="zipvl", form=name, tau_held=round(held, 3))
            label = (
                f"ZipVL, {name}, n = {tokens}: attainable speed-up reached ({gain:.2f}x of {1 / share:.2f}x)"
            )
            bench.claim(label, gain * share, ">= 0.85")
        bench.row(part="zipvl", form=name, tokens=tokens, flops_share=round(share, 4), **times[name].fields())


@part
def cache(bench: Benchmark, args: argparse.Namespace) -> None:
    """Bytes and a decode step of the mixed-precision cache, 30 % important, against bf16 keys and values."""
    tokens = 4096
    model = llama(2, 512).bfloat16()
    ids = prompt(1, tokens)
    mixed, dense = MixedPrecisionCache(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model.set_attn_implementation("thresher_kv")
        first = model(ids, past_key_values=mixed, logits_to_keep=1).logits
        model.set_attn_implementation("sdpa")
        model(ids, past_key_values=dense, logits_to_keep=1)
    full = sum(2 * layer.keys.numel() * 2 for layer in dense.layers)
    bench.row(part="cache", tokens=tokens, bytes=mixed.bytes, bytes_bf16=full)
    bench.claim("KV bytes at 4/2 bits, 30 % important, of bf16's", mixed.bytes / full, "<= 0.25")
    q = torch.randn(1, 8, 1, 64, dtype=torch.bfloat16)
    layer, plain = mixed.layers[0], dense.layers[0]
    new = torch.randn(2, 1, 4, 1, 64, dtype=torch.bfloat16)
    layer.extend(*new)
    pools = [t for pool in layer.pools for t in pool]
    attend = torch.nn.functional.scaled_dot_product_attention
    calls = {
        "bf16": lambda: attend(q, plain.keys, plain.values, enable_gqa=True),
        "4/2 bits": lambda: torch.ops.thresher.kv_attention(q, pools, layer.keys, layer.values, None, 0.125),
    }
    times = timed(args, calls, 15)
    for name, timing in times.items():
        bench.row(part="cache", form=name, tokens=tokens, **timing.fields())
    bench.claim(
        "decode attention, bf16 cache's time over ours, 4k tokens",
        times["bf16"].cpu_min / times["4/2 bits"].cpu_min,
        ">= 1",
    )
    assert first.isfinite().all()


@part
def agreement(bench: Benchmark, args: argparse.Namespace) -> None:
    """100 greedy tokens of SmolLM2 with the mixed-precision cache against its own dense ones."""
    from pydoc_data.topics import topics

    from thresher.tools import models

    model, tokenizer = models.smollm2()
    text = topics["lambda"] + topics["class"]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : 256 if args.quick else 768]
    new = 30 if args.quick else 100
    options = dict(max_new_tokens=new, do_sample=False)
    with torch.no_grad():
        dense = model.generate(ids, **options)[:, ids.shape[1] :]
        model.set_attn_implementation("thresher_kv")
        for name, policy in {
            "4/2 bits": KVPolicy(),
            "4/4 bits": KVPolicy(bits=(4, 4)),
            "8/4 bits": KVPolicy(bits=(8, 4)),
        }.items():
            held = MixedPrecisionCache(model.config, policy)
            ours = model.generate(ids, past_key_values=held, **options)[:, ids.shape[1] :]
            same = ours[:, : dense.shape[1]] == dense[:, : ours.shape[1]]
            run = int(same[0].long().cumprod(0).sum())
            bench.row(
                part="agreement",
                form=name,
                prompt=ids.shape[1],
                equal=round(same.float().mean().item(), 3),
                until=run,
            )
        model.set_attn_implementation("sdpa")


@part
def recompiles(bench: Benchmark, args: argparse.Namespace) -> None:
    """50 requests of one length with other spans."""
    model, ids = llama(4, 64), prompt(2, 256)
    inputs = dict(input_ids=ids, use_cache=False)
    call = compiled(
        model,
        inputs,
        "reference",
        transprune=dict(policy="transprune", stages=((1, 0.5),), image_token_id=IMAGE),
    )
    make = torch.Generator().manual_seed(0)
    buckets = {96}
    for _ in range(50):
        ids = torch.randint(1, IMAGE, (2, 256), generator=make)
        start, length = (int(torch.randint(a, b, (), generator=make)) for a, b in ((0, 40), (64, 200)))
        ids[:, start : start + length] = IMAGE
        call(input_ids=ids, use_cache=False)
        buckets.add(length // 2 // 16 * 16)
    built = 1 + len(call.sessions[0].variants)
    bench.row(part="recompiles", requests=50, buckets=len(buckets), programs=built)
    bench.claim("programs built for 50 requests, less the number of buckets", built - len(buckets), "<= 0")


@part
def tiny_vlm(bench: Benchmark, args: argparse.Namespace) -> None:
    from tiny_vlm import measure

    measure.run(bench, args)


@part
def peers(bench: Benchmark, args: argparse.Namespace) -> None:
    from tiny_vlm import peers

    peers.run(bench, args)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", nargs="+", choices=sorted(PARTS), help="run these parts only")
        parser.add_argument(
            "--seeds", type=int, nargs="+", help="of tiny_vlm: models to ask; three by default"
        )
        parser.add_argument(
            "--more", type=Path, nargs="+", help="of tiny_vlm: records of other seeds to count in"
        )
        parser.add_argument("--kvpress", help="of peers: an interpreter with kvpress (see tiny_vlm/peers.py)")
        parser.add_argument("--lock", type=Path, help="a file to lock while timing, where others time too")

    args = arguments(__doc__, more)
    bench = Benchmark("tokens", args)
    skipped = {"tiny_vlm", "zipvl", "agreement", "peers"} if args.quick and not args.only else set()
    for name, measure in PARTS.items():
        if name in (args.only or PARTS):
            if name in skipped:
                bench.not_measured(name, "Left out by --quick.")
            else:
                measure(bench, args)
    bench.not_measured("anything on a GPU", "This machine has no GPU.")
    bench.finish()


if __name__ == "__main__":
    main()
