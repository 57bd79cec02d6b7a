"""The cells of the matrix of methods and targets: how a model is rewritten, lowered, run and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


class Skip(Exception):
    """Why a cell is not filled, as a sentence."""


def cut(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """The model with its first layers only; 0 keeps all."""
    if layers:
        stack = model.model if hasattr(model, "model") else model.encoder
        name = "layers" if hasattr(stack, "layers") else "layer"
        setattr(stack, name, getattr(stack, name)[:layers])
        model.config.num_hidden_layers = layers
    return model


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
