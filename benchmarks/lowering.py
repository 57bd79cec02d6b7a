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
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import _decode
import _packed_onnx
import torch
from _harness import Benchmark, arguments
from _lowering_cells import (
    EXACT,
    METHODS,
    Skip,
    call,
    cells,
    cut,
    quantized,
    rewrite,
)
from _lowering_warm import spent, warm

import thresher
from thresher import export
from thresher.errors import ThresherError
from thresher.lowering.tensorrt import engine as tensorrt
from thresher.tools import models

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


def packed(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    model, _ = models.load("minilm")
    _packed_onnx.run(bench, folder, model, rounds=3 if args.quick else 9)


def decode(bench: Benchmark, folder: Path, args: argparse.Namespace) -> None:
    model, _ = models.smollm2()
    label = "SmolLM2-135M" if not args.quick else "SmolLM2 cut to 2 layers"
    _decode.run(bench, folder, cut(model, 2 if args.quick else 0), label, rounds=3 if args.quick else 9)


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
    main()
