"""Mixtures of experts and encoder-decoders, whole models: packed prefill, decode with NVFP4 experts, and T5's generate.

prepack: 4 layers of Qwen3-MoE's shape (16 experts, 4 a token) and Mixtral's (8, 2), 16 rows of long-tail lengths up to 512.
S* is the bound that FLOPs set, with the experts that a token goes to: the padded batch's over its real tokens'. E is the
speed-up over padded torch.compile, over S*.
decode: a step of 8 rows of the same shapes, wider, with experts in NVFP4, and the model in bf16 as torch.compile has it; a
step is what new tokens behind the first take in `generate`.
t5: 16 rows of long-tail lengths up to 256 through the encoder, and 16 new tokens each, by `generate`; the padded form has
its encoder and its decoder's step compiled by Inductor.

All weights are random: shapes and lengths decide. `--parts` names some of prepack, decode, t5.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from _harness import Benchmark, arguments, interleave
from _prepacking_model import LONGEST, ROWS, VOCABULARY, batch_of

import thresher
from thresher.tools import lengths as length_sets

PARTS = ("prepack", "decode", "t5")
CLAIMS = {
    "prepack": "E of prepack on mixtures' shapes, long-tail",
    "decode": "decode of mixtures' shapes with NVFP4 experts over bf16 dense",
    "t5": "T5, long-tail: prefill and 16 steps over padded Inductor",
}
NEW = 16


def mixtures(hidden: int, inner: int, layers: int) -> dict[str, Callable[[], Any]]:
    """Makers of the two kinds of models by name. inner: the width of Qwen3-MoE's experts; Mixtral's are thrice as wide."""
    shared = dict(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    qwen = dict(moe_intermediate_size=inner, intermediate_size=inner, num_experts=16, num_experts_per_tok=4)
    mixtral = dict(intermediate_size=3 * inner, num_local_experts=8, num_experts_per_tok=2)
    return {
        "Qwen3-MoE": lambda: made(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**shared, **qwen)),
        "Mixtral": lambda: made(hf.MixtralForCausalLM, hf.MixtralConfig(**shared, **mixtral)),
    }


def made(kind: type, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:  # experts are left empty by some classes
                p.normal_(0, 0.02 if "embed" in name else p.shape[-1] ** -0.5)
    return model


def bound(lengths: list[int], model: Any) -> float:
    """S*: FLOPs of the padded batch over those of its real tokens, an expert's counted for the tokens that go to it."""
    config = model.config
    share = config.num_experts_per_tok / (
        getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    )
    weights = {n: p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and "embed_tokens" not in n}
    linear = 2 * sum(size * (share if ".experts." in n else 1) for n, size in weights.items())
    pair, longest = 4 * config.num_hidden_layers * config.num_attention_heads * 64, max(lengths)
    padded = len(lengths) * longest * (linear + pair * longest)
    return padded / (sum(lengths) * linear + pair / 2 * sum(n * n for n in lengths))


def prepack(bench: Benchmark, quick: bool, rounds: int) -> None:
    """The claims on E."""
    lengths = length_sets.draw("long-tail", ROWS, LONGEST)
    batch = batch_of(lengths)
    real = batch["attention_mask"].bool()
    for name, make in mixtures(384, 256, 2 if quick else 4).items():
        torch._dynamo.reset()
        model = make()
        ours = thresher.compile(model, batch, dynamic=True)
        padded = torch.compile(model, backend="inductor", dynamic=True)
        forms = {
            "padded compile": functools.partial(padded, **batch, use_cache=False),
            "ours": functools.partial(ours, **batch),
        }
        with torch.no_grad():
            times = interleave(forms, rounds=rounds, warmup=1)
            expected = model(**batch, use_cache=False).logits[real]
            error = float((ours(**batch).logits[real] - expected).abs().max() / expected.abs().max())
        best = bound(lengths, model)
        gained = times["padded compile"].cpu_min / times["ours"].cpu_min
        for form, timing in times.items():
            bench.row(part="prepack", model=name, form=form, bound=round(best, 2), **timing.fields())
        bench.claim(f"E of prepack on {name}'s shape, long-tail", gained / best, ">= 0.85")
        bench.claim(f"{name}: largest difference at real tokens, over the largest value", error, "<= 1e-4")
        bench.save()


def _step(form: Any, batch: dict[str, torch.Tensor], rounds: int) -> Callable[[], float]:
    """Gives the CPU seconds of one step: those of NEW + 1 new tokens less those of one, over NEW."""

    def taken(new: int) -> float:
        began = time.process_time()
        form.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.process_time() - began

    taken(NEW + 1), taken(1)  # compile
    return lambda: (taken(NEW + 1) - taken(1)) / NEW


def decode(bench: Benchmark, quick: bool, rounds: int) -> None:
    """The claims on decoding."""
    batch = batch_of([24] * 8)
    for name, make in mixtures(768, 512, 2 if quick else 4).items():
        torch._dynamo.reset()
        half = make().to(torch.bfloat16)
        dense = copy.deepcopy(half)
        dense.forward = torch.compile(dense.forward, backend="inductor", dynamic=True)
        ours = thresher.compile(half, batch, nvfp4={"budget": 1.0})
        steps = {"bf16 compile": _step(dense, batch, rounds), "NVFP4 experts": _step(ours, batch, rounds)}
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(rounds):
            for form, step in steps.items():
                best[form] = min(best[form], step())
        account = ours.report["nvfp4"]
        done = account.coverage
        for form, seconds in best.items():
            bench.row(
                part="decode", model=name, form=form, step_ms=round(seconds * 1e3, 2), coverage=round(done, 3)
            )
        gained = best["bf16 compile"] / best["NVFP4 experts"]
        bench.claim(f"decode of {name}'s shape with NVFP4 experts over bf16 dense", gained, ">= 1.5")
        bench.save()


def t5(bench: Benchmark, quick: bool, rounds: int) -> None:
    """The claim on an encoder-decoder."""
    torch._dynamo.reset()
    layers = 2 if quick else 4
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=384, d_ff=1024, d_kv=64, num_heads=6, num_layers=layers, num_decoder_layers=layers,
        pad_token_id=0, eos_token_id=None, decoder_start_token_id=0,
    )  # fmt: skip
    model = made(hf.T5ForConditionalGeneration, config)
    model.generation_config.eos_token_id = None
    lengths = length_sets.draw("long-tail", ROWS, LONGEST // 2)
    batch = batch_of(lengths)
    padded = copy.deepcopy(model)
    padded.encoder.forward = torch.compile(padded.encoder.forward, backend="inductor", dynamic=True)
    padded.forward = torch.compile(padded.forward, backend="inductor", dynamic=True)
    start = torch.zeros(ROWS, 1, dtype=torch.long)
    ours = thresher.compile(model, {**batch, "decoder_input_ids": start}, dynamic=True)
    length = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    forms = {
        "padded compile": lambda: padded.generate(**batch, **length),
        "ours": lambda: ours.generate(**batch, **length),
    }
    times = interleave(forms, rounds=rounds, warmup=2)
    same = torch.equal(forms["ours"](), model.generate(**batch, **length))
    for form, timing in times.items():
        bench.row(part="t5", model="T5", form=form, **timing.fields())
    gained = times["padded compile"].cpu_min / times["ours"].cpu_min
    bench.claim(f"T5, long-tail: prefill and {NEW} steps over padded Inductor", gained, ">= 2")
    bench.claim("T5: generates eager's tokens", float(same), ">= 1")


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="default all")
        parser.add_argument("--rounds", type=int, help="of each form; else 5, or 2 with --quick")

    args = arguments(__doc__, add)
    import warnings

    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    bench = Benchmark("mixtures", args)
    rounds = args.rounds or (2 if args.quick else 5)
    for name, part in (("prepack", prepack), ("decode", decode), ("t5", t5)):
        if name in args.parts:
            part(bench, args.quick, rounds)
        else:
            bench.not_measured(CLAIMS[name], f"The part {name} was not run for this record.")
    bench.finish()


if __name__ == "__main__":
    main()
