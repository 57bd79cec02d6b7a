"""Half precision: what is kept and what is found wrong, and how fast bf16 runs beside what a user would otherwise take.

    kept      prepacking of seven models in bf16, fp16 and under autocast: rolled back or not
    wrong     deliberately wrong packed attention, found in every dtype
    proof     seconds of judging, beside comparing on the example alone
    minilm    texts a second in bf16, in the order they arrive, beside batches sorted by length, and OpenVINO's
    share     of the speed-up that FLOPs allow in bf16 (E), over sets of lengths
    low-bit   NVFP4 and 4-bit products of 4096 x 4096 beside bf16 linear, by rows
    presets   embed and edge-cpu beside their parts

Times are CPU time, the least of interleaved rounds. Programs run through the target named by --target: "reference" calls
PyTorch's own kernels node by node and compiles nothing, the default of --quick; "inductor" otherwise. What needs AMX is
listed as not measured where the processor has none. --openvino names the Python of an environment that has it, with what
benchmarks/_openvino.py imports.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, arguments, interleave
from prepacking import quiet

from thresher import backend, ops
from thresher.kernels import native
from thresher.recipe import Recipe
from thresher.strict import compile_strictly
from thresher.tools import models

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import captures
import wrong_attention
import zoo
from _precision_models import BATCH, DTYPES, captured, each, texts
from _precision_speed import low_bit, minilm, share

MODELS = ("bert", "roberta", "modernbert", "llama", "qwen3", "gemma3")
PARTS = ("kept", "wrong", "proof", "minilm", "share", "low-bit", "presets")
BF16 = bool(native.cpu_features() & {"amx_bf16", "avx512_bf16"})


def account(program: Any, inputs: list[Any], **options: Any) -> Any:
    """What became of prepacking."""
    with torch.no_grad():
        report = backend.run_pipeline(program, Recipe.of({"prepack": True, **options}), inputs)[1]
    return report["prepack"]


def kept(bench: Benchmark, args: Namespace) -> None:
    """Prepacking of tiny models and MiniLM."""
    cases = [(n, d) for n in MODELS for d in DTYPES] + [("MiniLM", d) for d in DTYPES]
    count = 0
    for name, dtype in cases:
        if name == "MiniLM":
            model, inputs = models.minilm()[0], {k: v[:4] for k, v in texts(8, "arrival")[0].items()}
        else:
            model, inputs = zoo.ZOO[name].build()
        found = account(*captured(model, inputs, dtype))
        count += bool(found.rewritten)
        bench.row(part="kept", model=name, dtype=dtype, kept=bool(found.rewritten), error=found.error, own=found.own,
                  budget=found.budget)  # fmt: skip
    bench.claim("prepack kept in bf16, fp16 and under autocast, of 21 models", count / len(cases), ">= 1")


def wrong(bench: Benchmark, args: Namespace) -> None:
    """Deliberately wrong packed attention."""
    op = ops.get("varlen_attention")
    faults = {
        "one key too many": wrong_attention.next_segment_too,
        "bf16 read as fp32": wrong_attention.read_as_fp32,
    }
    names = ("bert",) if args.quick else ("bert", "llama")
    caught, tried = 0, 0
    providers = op.providers
    for name, dtype in itertools.product(names, ("fp32", *DTYPES)):
        program, inputs = captured(*zoo.ZOO[name].build(), dtype)
        for fault, make in faults.items():
            if fault == "bf16 read as fp32" and dtype == "fp32":
                continue
            op.providers = [ops.Provider("wrong", "cpu", make(op))]
            try:
                found = account(program, inputs)
            finally:
                op.providers = providers
            tried, caught = tried + 1, caught + (not found.rewritten)
            bench.row(part="wrong", model=name, dtype=dtype, fault=fault, caught=not found.rewritten,
                      error=found.error, budget=found.budget)  # fmt: skip
    bench.claim("deliberately wrong packed attention, share found", caught / tried, ">= 1")


def proof(bench: Benchmark, args: Namespace) -> None:
    """Seconds of judging MiniLM, sizes fixed and free. What the batches of few rows take does not grow with the example."""
    for dtype, dynamic, rows in itertools.product(("fp32", "bf16"), (False, True), (8, BATCH)):
        inputs = {k: v[:rows] for k, v in texts(rows, "arrival")[0].items()}
        model = models.minilm()[0].to(DTYPES.get(dtype, torch.float32))
        program = captures.dynamo(model, inputs, dynamic=dynamic)
        numbers = (p.meta["val"] for p in program.placeholders)
        given = [
            int(known.node.hint) if isinstance(known, torch.SymInt) else inputs[name]
            for name, known in zip(program.input_names, numbers)
        ]
        forms: dict[str, dict[str, Any]] = {
            "off": {"verify": False},
            "example": {"fixed_budgets": True},
            "proof": {},
        }
        spent = {}
        for form, options in forms.items():
            call = functools.partial(account, program, given, **options)
            spent[form] = min(_seconds(call) for _ in range(2))
        ratio = (spent["proof"] - spent["off"]) / max(spent["example"] - spent["off"], 1e-6)
        sizes = "free" if dynamic else "fixed"
        bench.row(part="proof", model="MiniLM", dtype=dtype, sizes=sizes, rows=rows, ratio=round(ratio, 2),
                  **{f"{k}_s": round(v, 3) for k, v in spent.items()})  # fmt: skip
        bench.claim(
            f"seconds of judging over comparing on the example: MiniLM {dtype}, {rows} rows, sizes {sizes}",
            ratio,
            "<= 1.5",
        )


def _seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def presets(bench: Benchmark, args: Namespace) -> None:
    """Presets on MiniLM in fp32, beside what they are made of."""
    model = models.minilm()[0]
    batch = {k: v[: 8 if args.quick else BATCH] for k, v in texts(BATCH, "arrival")[0].items()}
    recipes = {"none": "none", "exact": "exact", "embed": "embed", "edge-cpu": "edge-cpu"}
    if BF16:
        recipes["bf16"] = {"bf16": True, "min_gain": 0.97}
    with torch.no_grad():
        made = {
            n: compile_strictly(model, batch, Recipe.of(r), target=args.target, may_do_nothing=True)
            for n, r in recipes.items()
        }
        forms = {n: functools.partial(each, f, [batch]) for n, f in made.items()}
        times = interleave(forms, rounds=5, warmup=1, least_ms=0)
        expected = model(**batch)[0][batch["attention_mask"].bool()]
        for name, fast in made.items():
            found = fast(**batch)[0][batch["attention_mask"].bool()]
            passes = {p.name: len(p.rewritten) for p in fast.report.passes if p.rewritten}
            error = float((found - expected).abs().max() / expected.abs().max())
            bench.row(part="presets", form=name, rewritten=str(passes), error=error, target=args.target,
                      **times[name].fields())  # fmt: skip
    parts = [n for n in ("none", "exact", "bf16") if n in times]
    best = min(times[n].cpu_min for n in parts)
    bench.claim("preset embed over the best of its parts", best / times["embed"].cpu_min, ">= 0.99")
    bench.claim("preset edge-cpu over exact", times["exact"].cpu_min / times["edge-cpu"].cpu_min, ">= 1.0")


RUN = dict(zip(PARTS, (kept, wrong, proof, minilm, share, low_bit, presets), strict=True))


def main() -> None:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
        parser.add_argument("--target", choices=("reference", "inductor"))
        parser.add_argument("--openvino", metavar="PYTHON", help="a Python that has openvino")

    args = arguments(__doc__, add)
    args.target = args.target or ("reference" if args.quick else "inductor")
    quiet()
    bench = Benchmark("precision", args)
    for part in PARTS:
        if part not in args.parts:
            bench.not_measured(f"part {part}", "Left out by --parts.")
    for part in args.parts:
        started = time.process_time()
        RUN[part](bench, args)
        bench.row(part=part, cpu_seconds=round(time.process_time() - started, 1))
        bench.save()
    bench.not_measured(
        "DEFT kernels in bf16 and int8, one row, 5 to 30 %: share of the byte-ideal",
        "benchmarks/deft.py measures it.",
    )
    bench.finish()


if __name__ == "__main__":
    main()
