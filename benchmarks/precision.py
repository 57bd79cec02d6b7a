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
import json
import math
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, arguments, interleave
from prepacking import ROWS, batch_of, bound, decoder, quiet

import thresher
from thresher import backend, ops
from thresher.formats import bitpack
from thresher.kernels import native
from thresher.kernels.nvfp4.quantize import quantize
from thresher.kernels.varlen.attention import attend
from thresher.recipe import Recipe
from thresher.strict import compile_strictly
from thresher.tools import lengths as length_sets
from thresher.tools import models

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import captures
import zoo

MODELS = ("bert", "roberta", "modernbert", "llama", "qwen3", "gemma3")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}
PARTS = ("kept", "wrong", "proof", "minilm", "share", "low-bit", "presets")
BATCH = 32
AMX = "amx_bf16" in native.cpu_features()
BF16 = bool(native.cpu_features() & {"amx_bf16", "avx512_bf16"})
NO_AMX = "This processor has no AMX."
RECORD = Path(__file__).parent / "results" / "nvfp4.json"


def captured(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: str) -> tuple[Any, list[Any]]:
    """A model as it runs in that dtype, as a Program, and its inputs."""
    model = model.to(DTYPES.get(dtype, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        program = captures.dynamo(model, inputs)
    return program, captures.arguments(program, inputs)


def account(program: Any, inputs: list[Any], **options: Any) -> Any:
    """What became of prepacking."""
    with torch.no_grad():
        report = backend.run_pipeline(program, Recipe.of({"prepack": True, **options}), inputs)[1]
    return report["prepack"]


def texts(count: int, order: str) -> list[dict[str, torch.Tensor]]:
    """Batches of Python's language reference, as MiniLM reads it. order: "arrival" or "sorted"."""
    _, tokenizer = models.minilm()
    chosen = list(models.texts())[:count]
    if order == "sorted":
        chosen.sort(key=lambda t: len(tokenizer(t, truncation=True, max_length=256)["input_ids"]))
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    return [
        dict(tokenizer(p, padding=True, truncation=True, max_length=256, return_tensors="pt")) for p in parts
    ]


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


def _next_key_too(op: ops.Op) -> Callable[..., torch.Tensor]:
    """Attention in which each segment's tokens see the first token of the next segment too."""

    def run(q, k, v, cu, max_len, scale, causal, window, softcap):
        out = op.reference(q, k, v, cu, max_len, scale, causal, window, softcap).clone()
        for begin, end in itertools.pairwise(cu.tolist()):
            if begin < end < q.shape[2]:
                seen = torch.ones(end - begin, end - begin + 1, dtype=torch.bool)
                if causal:
                    seen = seen.tril()
                    seen[:, -1] = True
                parts = q[:, :, begin:end], k[:, :, begin : end + 1], v[:, :, begin : end + 1]
                out[:, :, begin:end] = attend(*parts, scale, softcap, seen)
        return out

    return run


def _other_dtype(op: ops.Op) -> Callable[..., torch.Tensor]:
    """Values read as fp32 numbers, two of them at a time."""

    def run(q, k, v, *rest):
        words = v.contiguous().view(torch.int16).flatten()
        wide = torch.cat([words, words])[: 2 * words.numel()].view(torch.float32).reshape(v.shape)
        return op.reference(q, k, wide.nan_to_num(0.0).clamp(-8, 8).to(v.dtype), *rest)

    return run


def wrong(bench: Benchmark, args: Namespace) -> None:
    """Deliberately wrong packed attention."""
    op = ops.get("varlen_attention")
    faults = {"one key too many": _next_key_too, "bf16 read as fp32": _other_dtype}
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
    """Seconds of judging MiniLM, sizes fixed and free."""
    inputs = {k: v[:8] for k, v in texts(8, "arrival")[0].items()}
    for dtype, dynamic in itertools.product(("fp32", "bf16"), (False, True)):
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
        bench.row(part="proof", model="MiniLM", dtype=dtype, sizes=sizes, ratio=round(ratio, 2),
                  **{f"{k}_s": round(v, 3) for k, v in spent.items()})  # fmt: skip
        bench.claim(
            f"seconds of judging over comparing on the example: MiniLM {dtype}, sizes {sizes}",
            ratio,
            "<= 1.5",
        )


def _seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def _all(form: Callable[..., Any], batches: Sequence[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            form(**batch)


def minilm(bench: Benchmark, args: Namespace) -> None:
    """Texts a second in bf16."""
    count = 64 if args.quick else 384
    orders = {order: texts(count, order) for order in ("arrival", "sorted")}
    model = models.minilm()[0].to(torch.bfloat16)
    ours = thresher.compile(model, orders["arrival"][0], "exact", target=args.target, dynamic=True)
    forms = {f"eager {order}": functools.partial(_all, model, given) for order, given in orders.items()}
    forms |= {f"thresher {order}": functools.partial(_all, ours, given) for order, given in orders.items()}
    times = interleave(forms, rounds=3, warmup=1, least_ms=0)
    speeds = {name: count / t.cpu_min * 1e3 for name, t in times.items()}
    speeds |= {f"openvino {k}": count / s for k, s in _openvino(bench, args, orders).items()}
    for name, speed in speeds.items():
        bench.row(part="minilm", form=name, texts=count, target=args.target, texts_a_second=round(speed, 1))
    for against, rival in (("eager bf16", "eager sorted"), ("OpenVINO bf16", "openvino bf16 sorted")):
        claim = f"MiniLM bf16, arrival order, one core: over {against} sorted by length"
        if rival not in speeds:
            bench.not_measured(claim, "--openvino names no Python that has it.")
        elif AMX:
            bench.claim(claim, speeds["thresher arrival"] / speeds[rival], ">= 2.0")
        else:
            bench.claim(f"{claim}, without AMX", speeds["thresher arrival"] / speeds[rival], ">= 1.0")
            bench.not_measured(claim, NO_AMX)
    gained = speeds["thresher arrival"] / speeds["eager arrival"]
    bench.claim("MiniLM bf16, arrival order, one core: over eager bf16 in the same order", gained, ">= 1.3")


def _openvino(bench: Benchmark, args: Namespace, orders: dict[str, Any]) -> dict[str, float]:
    if args.openvino is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.pt"
        torch.save(orders, path)
        script = str(Path(__file__).parent / "_openvino.py")
        done = subprocess.run([args.openvino, script, str(path)], capture_output=True, text=True)
    if done.returncode:
        bench.not_measured(
            "OpenVINO", f"It failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}."
        )
        return {}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    bench.row(part="minilm", form=f"openvino {found['version']}")
    return dict(found["seconds"])


def share(bench: Benchmark, args: Namespace) -> None:
    """E in bf16: the speed-up over the padded program, of what FLOPs allow."""
    layers = 2
    model = decoder(layers).to(torch.bfloat16)
    names = ("long-tail", "one-long") if args.quick else (
        "long-tail", "one-long", "uniform", "mmlu-like", "alpaca-like", "samsum-like")  # fmt: skip
    drawn = {n: length_sets.draw(n, ROWS, 256 if args.quick else 512) for n in names}
    batches = {n: batch_of(drawn[n]) for n in names}
    first = batches[names[0]]
    ours, padded = (
        thresher.compile(model, first, r, target=args.target, dynamic=True) for r in ("exact", "none")
    )
    reached = []
    for name, batch in batches.items():
        forms = {
            "padded": functools.partial(_all, padded, [batch]),
            "ours": functools.partial(_all, ours, [batch]),
        }
        times = interleave(forms, rounds=3, warmup=1, least_ms=0)
        best = bound(drawn[name], model, layers)
        gained = times["padded"].cpu_min / times["ours"].cpu_min
        reached.append(gained / best)
        bench.row(
            part="share",
            lengths=name,
            bound=round(best, 2),
            speedup=round(gained, 2),
            E=round(gained / best, 3),
        )
    mean = math.exp(sum(map(math.log, reached)) / len(reached))
    bench.claim(f"E in bf16, geometric mean over {len(names)} length sets", mean, ">= 0.90")


def low_bit(bench: Benchmark, args: Namespace) -> None:
    """Products by weights of four bits."""
    size = 4096
    torch.manual_seed(0)
    weight = (torch.randn(size, size) * 0.02).bfloat16()
    q = quantize(weight)
    words = torch.randint(0, 1 << 30, (size, bitpack.words(size, 4)), dtype=torch.int32)
    scales = torch.rand(size, size // 64) * 1e-3
    known = _recorded()
    targets = {1: ">= 3.5", 8: ">= 1.2", 64: ">= 1.0", 512: ">= 0.95"}
    for rows, target in targets.items():
        x = torch.randn(rows, size).bfloat16()
        forms = {
            "bf16 linear": lambda x=x: torch.nn.functional.linear(x, weight),
            "nvfp4": lambda x=x: torch.ops.thresher.nvfp4_linear(
                x, q.codes, q.block_scales, q.global_scale, None, None, "exact"
            ),
            "4 bits": lambda x=x: torch.ops.thresher.wna16_linear(x, words, scales, None, None, 4, 64),
        }
        with torch.no_grad():
            times = interleave(
                forms, rounds=5 if rows <= 8 else 3, warmup=1, least_ms=100 if rows == 1 else 0
            )
        for form, timing in times.items():
            ratio = times["bf16 linear"].cpu_min / timing.cpu_min
            bench.row(part="low-bit", rows=rows, form=form, over_bf16=round(ratio, 3), **timing.fields())
            if form == "bf16 linear":
                continue
            claim = f"{form} product 4096x4096, {rows} rows: bf16 linear's time over ours"
            if AMX:
                bench.claim(f"{claim}, on AMX", ratio, target)
                continue
            bench.not_measured(f"{claim}, on AMX", NO_AMX)
            bench.claim(f"{claim}, without AMX", ratio, target)
            if form == "nvfp4" and rows in known:
                bench.claim(f"{claim}, of what nvfp4.json holds", ratio / known[rows], ">= 0.95")


def _recorded() -> dict[int, float]:
    """Rows -> speed over bf16 linear in the record of this kind of machine."""
    from _harness import machine

    record = json.loads(RECORD.read_text())
    if {k: record["machine"][k] for k in ("cpu", "isa")} != {k: machine()[k] for k in ("cpu", "isa")}:
        return {}
    rows = (r for r in record["rows"] if r.get("weight") == "4096x4096" and r.get("form") == "nvfp4 exact")
    return {r["rows"]: r["against_bf16"] for r in rows if "against_bf16" in r}


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
        forms = {n: functools.partial(_all, f, [batch]) for n, f in made.items()}
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
