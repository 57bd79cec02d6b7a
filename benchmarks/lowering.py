"""What every method's rewrite becomes on every target, and how far the result is from the Program.

A matrix of models x methods x targets, each cell a pass with difference, build time and size, or the reason why
not; ONNX against Program; a 4-bit decode step against fp32 in ONNX Runtime; a warm start; save and load.

    python benchmarks/lowering.py [--quick] [--json PATH] [--layers N] [--only matrix,decode,...] [--minutes M]
        [--methods prompt,prepack,...] [--targets onnx-ort,...]

--layers cuts the models in the matrix to their first N layers (2 with --quick): the same operators, sooner done.
--methods and --targets fill a part of the matrix. --minutes stops building further cells; they are recorded as not run.
TensorRT cells need tensorrt-rtx, or THRESHER_RTX_PYTHON naming a Python that has it, and use the models in half precision.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _decode
import _packed_onnx
import torch
from _harness import Benchmark, arguments

import thresher
from thresher import backend, export
from thresher.errors import ThresherError
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.lowering.coverage import coverage
from thresher.lowering.decompose import own_nodes
from thresher.lowering.inductor.aoti import AOTInductor
from thresher.lowering.inductor.inductor import Inductor
from thresher.lowering.onnx.check import difference
from thresher.lowering.reference import Reference
from thresher.lowering.target import Target
from thresher.lowering.tensorrt import engine as tensorrt
from thresher.recipe import Recipe
from thresher.report import Report
from thresher.runtime.artifact import file as artifact
from thresher.runtime.session import Session
from thresher.tools import models

PROMPT = "prompt"  # without a mask, so that causality is all there is to attention
METHODS: dict[str, Any] = {
    "none": "none",
    PROMPT: "none",
    "prepack": {"prepack": True},
    "rsq int4": {"bits": 4, "group_size": 32},  # quantized first: see `quantized`
    "nvfp4": {"nvfp4": True},
    "deft": {"deft": True},
    # prompts here are short, so both are told to go to work all the same
    "zipvl": {"zipvl": dict(keep=0.4, recent=2, spread=2, bucket=4, min_saving=-9.0)},
    "transprune": {
        "transprune": dict(
            stages=((1, 0.5),), image_span=(2, 14), min_image_tokens=2, bucket=1, min_saving=-9.0
        )
    },
}
EXACT = {"none", PROMPT, "prepack"}
TARGETS = (
    "reference",
    "artifact",
    "onnx-ort",
    "onnx-ort-cuda",
    "onnx-portable",
    "tensorrt-rtx sm120",
    "inductor",
    "aoti",
)
SECTIONS = ("matrix", "packed", "decode", "warm", "artifact", "tensorrt")


class Skip(Exception):
    """Why a cell is not filled, as a sentence."""


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--layers", type=int, default=0)
        parser.add_argument("--only", default=",".join(SECTIONS))
        parser.add_argument("--minutes", type=float, default=600)
        parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
        parser.add_argument("--targets", type=lambda text: text.split(","), default=list(TARGETS))

    args = arguments(__doc__, more)
    if args.quick:
        args.layers = args.layers or 2
    bench = Benchmark("lowering", args)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for section in args.only.split(","):
            {
                "matrix": matrix,
                "packed": packed,
                "decode": decode,
                "warm": warm,
                "artifact": saved,
                "tensorrt": engines,
            }[section](bench, folder, args)
    bench.not_measured("an engine's speed and numbers; TensorRT proper", tensorrt.UNVERIFIED)
    bench.not_measured(
        "FX to engine",
        "Built and audited by tests/lowering/tensorrt/test_graph_parts.py in an environment of its own.",
    )
    bench.finish()


def cut(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """The model with its first layers only; 0 keeps all."""
    if layers:
        stack = model.model if hasattr(model, "model") else model.encoder
        name = "layers" if hasattr(stack, "layers") else "layer"
        setattr(stack, name, getattr(stack, name)[:layers])
        model.config.num_hidden_layers = layers
    return model


def matrix(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    worst = {"exact": 0.0, "approximate": 0.0}
    for name in ("minilm", "smollm2"):
        model, tokenizer = models.load(name)
        model = cut(model, args.layers)
        for method in args.methods:
            recipe = METHODS[method]
            batch = call(tokenizer, method)
            plain, _, inputs = export._captured(model, (), batch, None)
            try:
                recipe = quantized(model, batch, recipe, folder) if method.startswith("rsq") else recipe
                program, reason = rewrite(plain, recipe, inputs, method)
            except ThresherError as refusal:
                program, reason = None, str(refusal)[:300]
            made = cells(program, plain, inputs, (name, args.layers, method, recipe), folder, (model, batch))
            for target in args.targets:
                build = made[target]
                cell = dict(
                    section="matrix", model=name, layers=args.layers or "all", method=method, target=target
                )
                if program is None:
                    bench.row(**cell, result=f"not applicable: {reason}")
                    continue
                if time.monotonic() > deadline:
                    bench.row(**cell, result="not run: the time given by --minutes was up")
                    continue
                started, cpu = time.perf_counter(), spent()
                try:
                    found = build()
                except (Skip, ThresherError) as refusal:
                    bench.row(**cell, result=f"no: {str(refusal)[:300]}")
                    continue
                result = found.pop("result", "pass")
                bench.row(**cell, result=result, **found, build_s=round(time.perf_counter() - started, 1),
                          cpu_s=round(spent() - cpu, 1))  # fmt: skip
                if target.startswith("onnx") and "difference" in found:
                    kind = "exact" if method in EXACT else "approximate"
                    worst[kind] = max(worst[kind], found["difference"])
    if any(r.get("target") == "onnx-ort" and "difference" in r for r in bench.rows):
        bench.claim(
            "ONNX against Program, fp32, exact recipes: largest relative difference",
            worst["exact"],
            "<= 1e-5",
        )
        bench.claim(
            "ONNX against Program, approximate recipes: largest relative difference",
            worst["approximate"],
            "<= 1e-4",
        )


def call(tokenizer: Any, method: str) -> dict[str, Any]:
    """Four texts of mixed lengths, or one prompt without a mask."""
    batch = dict(models.mixed_length_batch(tokenizer, 4, max_len=32))
    if method != PROMPT:
        return batch
    longest = int(batch["attention_mask"].sum(1).argmax())
    length = int(batch["attention_mask"][longest].sum())
    return {"input_ids": batch["input_ids"][longest : longest + 1, -length:].repeat(2, 1)}


def cells(
    program: Any, plain: Program, inputs: list[Any], case: Any, folder: Path, own: tuple[Any, Any]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What fills each target's cell of one case (model, layers, method, recipe). own: the model and its call."""
    return {
        "reference": lambda: reference(program, plain, inputs),
        "artifact": lambda: file(program, inputs, folder, case, own),
        **{
            f"onnx-{runtime}": lambda runtime=runtime: exported(program, inputs, folder, runtime, case[2])
            for runtime in ("ort", "ort-cuda", "portable")
        },
        "tensorrt-rtx sm120": lambda: engine(*case, folder, "SM120"),
        "inductor": lambda: compiled(program, inputs, Inductor()),
        "aoti": lambda: compiled(program, inputs, AOTInductor()),
    }


def quantized(
    model: torch.nn.Module, batch: dict[str, Any], options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The recipe of RSQ on a model, calibrated on 8 x 64 random tokens: enough for a graph, not for a model.

    batch: a call of the model, whose inputs calibration gives too.
    """
    make = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (8, 64), generator=make)
    inputs = {
        n: torch.ones_like(tokens) if n == "attention_mask" else torch.zeros_like(tokens) for n in batch
    }
    low = thresher.quantize(model, [{**inputs, "input_ids": tokens}], {"rsq": options})
    low.save(folder / "low.safetensors")
    return low.options


def rewrite(plain: Program, recipe: Any, inputs: list[Any], method: str) -> tuple[Program | None, str]:
    """The program after one method, or None and the reason why nothing was rewritten."""
    if method == "none":
        return plain, ""
    try:
        with torch.no_grad():
            program, report = backend.run_pipeline(plain, Recipe.of(recipe), inputs)
    except ThresherError as reason:
        return None, str(reason)[:300]
    if not report.rewritten:
        return None, next((m.reason for p in report.passes for m in p.missed), "no candidate site")[:300]
    return program, ""


def run(program: Program, inputs: list[Any], target: Any = None) -> list[Any]:
    with torch.no_grad():
        return Session(program, target or Reference(), Reference(), Report("benchmark"))(inputs, {})


def apart(actual: list[Any], expected: list[Any], program: Program, inputs: list[Any]) -> float:
    """Largest relative difference at real tokens."""
    layout = program.packing
    real = inputs[layout.mask] != 0 if layout is not None else None
    pairs = [
        (a, e) for a, e in zip(actual, expected) if isinstance(e, torch.Tensor) and e.is_floating_point()
    ]
    return max(difference(a, e, real)[1] for a, e in pairs)


def reference(program: Program, plain: Program, inputs: list[Any]) -> dict[str, Any]:
    """The method's own cost in accuracy, against the model as it was."""
    return {"difference": apart(run(program, inputs), run(plain, inputs), program, inputs)}


def compiled(program: Program, inputs: list[Any], target: Target) -> dict[str, Any]:
    return {"difference": apart(run(program, inputs, target), run(program, inputs), program, inputs)}


def file(program: Program, inputs: list[Any], folder: Path, case: Any, own: Any) -> dict[str, Any]:
    if program.calls is not None:
        return calls(folder, case[3], *own)
    path = artifact.write(program, folder / "m.thresher", longest=256)
    layout = program.packing
    names = (layout.padded if layout is not None else program).input_names
    results = list(artifact.read(path, "reference")(**dict(zip(names, inputs, strict=True))).values())
    same = all(
        torch.equal(a, b) for a, b in zip(results, run(program, inputs)) if isinstance(a, torch.Tensor)
    )
    if not same:
        raise ThresherError("The loaded program gives other bits.")
    return {"difference": 0.0, "bytes": path.stat().st_size, "result": "pass, bit-equal"}


def calls(folder: Path, recipe: Any, model: Any, batch: Any) -> dict[str, Any]:
    """A model whose calls are looked at first, saved with the programs that they have needed."""
    made = thresher.compile(model, batch, recipe, target="reference", dynamic=True)
    expected = made(**batch)[0]
    path = thresher.save(made, folder / "m.thresher", example_inputs=batch, longest=256)
    results = next(iter(artifact.read(path, "reference")(**batch).values()))
    if not torch.equal(results, expected):
        raise ThresherError("The loaded programs give other bits.")
    return {
        "difference": 0.0,
        "bytes": path.stat().st_size,
        "result": "pass, bit-equal, with its calls' programs",
    }


def exported(program: Program, inputs: list[Any], folder: Path, runtime: str, method: str) -> dict[str, Any]:
    forms = [[(e.how, e.reason) for e in coverage(program, f"onnx-{r}").entries] for r in ("ort", runtime)]
    standard = runtime == "portable" and method != PROMPT and not own_nodes(program)
    if runtime != "ort" and (standard or (runtime == "ort-cuda" and forms[0] == forms[1])):
        return {"result": "pass: the same file as onnx-ort"}
    record = thresher.export_onnx(program, inputs, folder / "m.onnx", runtime=runtime)
    if not record.differences:
        raise Skip("; ".join(record.notes))
    own = [f"{n} {kind.split('::')[1]}" for kind, n in record.nodes.items() if "::" in kind]
    return {
        "difference": record.worst,
        "bytes": record.bytes,
        "engine": record.differences[0]["engine"],
        **({"own": ", ".join(own)} if own else {}),
    }


def engine(name: str, layers: int, method: str, recipe: Any, folder: Path, sm: str) -> dict[str, Any]:
    """An engine from the same method on the model in half precision: TensorRT has no fp32 attention operator."""
    reason = tensorrt.unavailable()
    if reason is not None:
        raise Skip(reason)
    model, tokenizer = models.load(name)
    model = cut(model, layers).half()
    batch = call(tokenizer, method)
    plain, _, inputs = export._captured(model, (), batch, None)
    if method.startswith("rsq"):
        recipe = quantized(model, batch, METHODS[method], folder)
    if isinstance(recipe, dict):
        recipe = {
            **recipe,
            "verify": False,
        }  # half precision rounds more than the passes' budgets, which are for fp32
    program, reason = rewrite(plain, recipe, inputs, method)
    if program is None:
        raise Skip(f"in half precision: {reason}")
    refused = coverage(program, "onnx-tensorrt").refused
    if refused:
        raise Skip(f"coverage says so before building: {refused[0].reason}")
    ranges = {}
    for place, given in zip(program.placeholders, program.input_names):
        known = value(place)
        if isinstance(known, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in known.shape):
            flat = known.dim() == 1
            ranges[given] = [
                [s if isinstance(s, int) else n if i or flat else k for i, s in enumerate(known.shape)]
                for n, k in ((8, 1), (32, 4), (64, 8))
            ]
    if program.packing is not None:
        ranges["cu_seqlens"] = [[2], [5], [9]]
    built = tensorrt.lower(program, folder, sm, ranges)
    fused = built.count("_gemm_mha_v2")
    return {"bytes": built.bytes, "result": f"pass: {len(built.kernels)} kernels, {fused} fused attentions, "
            f"{len(built.promised)} low-precision products as promised"}  # fmt: skip


def packed(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    model, _ = models.load("minilm")
    _packed_onnx.run(bench, folder, model, rounds=3 if args.quick else 9)


def decode(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    model, _ = models.smollm2()
    label = "SmolLM2-135M" if not args.quick else "SmolLM2 cut to 2 layers"
    _decode.run(bench, folder, cut(model, 2 if args.quick else 0), label, rounds=3 if args.quick else 9)


def warm(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    """MiniLM in processes that share Inductor's cache: compiled again, loaded from a file, and by torch alone."""
    cache = folder / "cache"
    found: dict[str, dict[str, float]] = {}
    for turn in ("cold", "warm", "loaded, cold", "loaded, warm", "plain torch, cold", "plain torch, warm"):
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "THRESHER_CACHE_DIR": str(
                folder / "kept"
            ),  # what a machine that compiles for the first time knows
        }
        command = [sys.executable, __file__, "--compile-once", str(args.layers), turn, str(folder)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            bench.not_measured("second-process warm start", ran.stderr.strip()[-300:])
            return
        found[turn] = json.loads(ran.stdout.strip().splitlines()[-1])
        bench.row(section="warm", model="minilm", form=turn, **found[turn])
    cold, again, loaded = (found[t] for t in ("cold", "warm", "loaded, warm"))
    start = "second-process warm start"
    bench.claim(
        f"{start}: lowering, CPU time over the cold one",
        again["lowering_cpu_s"] / cold["lowering_cpu_s"],
        "<= 0.15",
    )
    bench.claim(
        f"{start}: thresher.load and the first call, CPU time over a cold compile",
        loaded["whole_cpu_s"] / cold["whole_cpu_s"],
        "<= 0.15",
    )
    bench.claim(
        f"{start}: compiled again, CPU time over the cold one",
        again["whole_cpu_s"] / cold["whole_cpu_s"],
        "<= 0.15",
    )
    bench.claim(
        f"{start}: compiled again, CPU time over plain torch.compile's warm start",
        again["whole_cpu_s"] / found["plain torch, warm"]["whole_cpu_s"],
        "<= 1",
    )
    missed = sum(form["misses"] + form["bypasses"] for form in (again, loaded))
    bench.claim(f"{start}: recompiled graphs", missed, "== 0")


def compile_once(layers: int, turn: str, folder: Path) -> None:
    """Print what one start of MiniLM costs; run in a process of its own."""
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    path, batch_path = folder / "minilm.thresher", folder / "minilm.batch"
    if turn.startswith("loaded"):
        batch = torch.load(batch_path)
    else:
        model, tokenizer = models.load("minilm")
        model, batch = cut(model, layers), dict(models.mixed_length_batch(tokenizer, 8, max_len=64))
    lowering, once = [0.0], Inductor._compile

    def timed(self, *arguments):
        start = spent()
        made = once(self, *arguments)
        lowering[0] += spent() - start
        return made

    Inductor._compile = timed  # type: ignore[method-assign]
    start = spent()
    if turn.startswith("loaded"):
        thresher.load(path)(**batch)
    elif turn.startswith("plain"):
        with torch.no_grad():
            torch.compile(model, dynamic=True)(**batch)
    else:
        made = thresher.compile(model, batch, "exact", dynamic=True)
    whole, seen = spent() - start, counters["inductor"]
    if turn == "cold":
        torch.save(batch, batch_path)
        thresher.save(made, path, example_inputs=batch, longest=128)
    print(json.dumps({
        "lowering_cpu_s": lowering[0], "whole_cpu_s": whole, "hits": seen["fxgraph_cache_hit"],
        "misses": seen["fxgraph_cache_miss"], "bypasses": seen["fxgraph_cache_bypass"],
    }))  # fmt: skip


def spent() -> float:
    """CPU seconds of this process and of the children it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def saved(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    """SmolLM2, packed, saved here and loaded in a process of its own."""
    model, tokenizer = models.load("smollm2")
    model = cut(model, 2 if args.quick else 0)
    model.config.use_cache = False
    batch = dict(models.mixed_length_batch(tokenizer, 2, max_len=24))
    made = thresher.compile(model, batch, "exact", target="reference", dynamic=True)
    started = time.perf_counter()
    path = thresher.save(made, folder / "smollm2.thresher", example_inputs=batch, longest=128)
    seconds = time.perf_counter() - started
    expected = made(**batch).logits
    torch.save({"inputs": batch, "logits": expected}, folder / "expected")
    script = (
        "import sys, json, time, torch, thresher\nimport thresher.export\ntorch.set_num_threads(1)\n"
        "t = time.perf_counter(); c = time.process_time()\n"
        "m = thresher.load(sys.argv[1], target='reference')\n"
        "found = dict(load_s=time.perf_counter() - t, load_cpu_s=time.process_time() - c)\n"
        "given = torch.load(sys.argv[2])\n"
        "same = torch.equal(m(**given['inputs']).logits, given['logits'])\n"
        "print(json.dumps({**found, 'bit_equal': same, 'transformers': 'transformers' in sys.modules}))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path), str(folder / "expected")], capture_output=True, text=True
    )
    if ran.returncode:
        bench.not_measured("save -> load -> run", ran.stderr.strip()[-300:])
        return
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    bench.row(section="artifact", model="smollm2", layers=model.config.num_hidden_layers, bytes=path.stat().st_size,
              save_s=round(seconds, 1), **found)  # fmt: skip
    label = "SmolLM2" if not args.quick else "SmolLM2 cut to 2 layers"
    bench.claim(f"save -> load -> run: {label} bit-equal in a process without transformers",
                float(found["bit_equal"] and not found["transformers"]), "== 1")  # fmt: skip
    bench.claim(f"{label}: load, wall s", found["load_s"], "<= 2")


def engines(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    """The engines that the tests build: both capabilities, all graphs."""
    reason = tensorrt.unavailable()
    if reason is not None:
        bench.not_measured("TensorRT-RTX builds of all listed graphs", reason)
        return
    root = Path(__file__).resolve().parents[1] / "tests"
    sys.path.insert(0, str(root / "support"))
    path = root / "lowering" / "tensorrt" / "test_engine.py"
    spec = importlib.util.spec_from_file_location("test_engine", path)
    assert spec is not None and spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    graphs = cases.exported(folder)
    started, built = time.perf_counter(), 0
    for sm in ("SM89", "SM120"):
        for name, (path, profiles) in graphs.items():
            row = dict(
                section="tensorrt", model="one Llama layer", method=name, target=f"tensorrt-rtx {sm.lower()}"
            )
            try:
                made = tensorrt.build(path, folder / "plan", sm, profiles)
            except ThresherError as refusal:
                expected = (name, sm) == ("nvfp4", "SM89")
                built += expected
                text = "SM 8.9 has no FP4" if expected else str(refusal)[:300]
                bench.row(**row, result=f"no: {text}")
                continue
            built += 1
            low = sorted({t for types in made.promised.values() for t in types})
            bench.row(**row, result="pass", bytes=made.bytes, build_s=round(made.seconds, 2), kernels=len(made.kernels),
                      fused_attentions=made.count("_gemm_mha_v2"), operand_types=", ".join(low) or "half")  # fmt: skip
    bench.claim("TensorRT-RTX: graphs as listed, both capabilities", float(built), f"== {2 * len(graphs)}")
    bench.claim("TensorRT-RTX: all builds together, wall s", time.perf_counter() - started, "<= 180")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile-once"]:
        compile_once(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        main()
