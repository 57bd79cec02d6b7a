"""`thresher.quantize`: low-bit weights from a model and some text, in one call.

    low = thresher.quantize(model, texts, RSQ(bits=3), tokenizer=tokenizer)
    print(low.report)
    low.save("model-3bit.safetensors")
    compiled = thresher.compile(model, example_inputs, **low.options)
    compiled = torch.compile(model, backend="thresher", options=low.options)

The model itself is not changed. The file holds codes and scales; it belongs to the weights it was made from,
and is refused for others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thresher.passes.calibrate import Statistics
from thresher.passes.keep import kept_layers, unnamed
from thresher.passes.rsq import rsq
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer import driver as rsq_driver
from thresher.passes.rsq.quantizer.importance import shift_sequences
from thresher.passes.rsq.quantizer.outcome import Outcome
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.structure.recover import recover

from .errors import ArgumentError, ThresherError
from .files import cache_folder
from .graph import capture
from .graph.program import Program
from .model_capture import shown_to, without_cache
from .recipe import Recipe
from .records.quantization_report import QuantizeReport
from .strict import check_model, names_nothing

RSQ = RSQConfig


@dataclass
class Quantized:
    """What `quantize` made. statistics: as compile reads it. report: what it cost and saved."""

    statistics: Statistics
    report: QuantizeReport
    config: RSQConfig
    path: Path | None = field(default=None)

    def save(self, path: str | Path) -> Path:
        """Write the safetensors file; an old one stays whole until the new one is complete."""
        self.path = Path(path)
        self.statistics.save(self.path)
        self.report.file_bytes = self.path.stat().st_size
        return self.path

    @property
    def options(self) -> dict[str, Any]:
        """Options for `thresher.compile(**options)` and `torch.compile(options=options)`.

        What was not saved yet is written to the cache directory first.
        """
        if self.path is None:
            folder = cache_folder("quantized") or Path(tempfile.mkdtemp(prefix="thresher-"))
            self.save(folder / f"{self.statistics.fingerprint}-{time.time_ns()}.safetensors")
        return {"rsq": {"budget": self.config.budget}, "stats": str(self.path)}


def quantize(
    model: torch.nn.Module,
    data: Any = None,
    recipe: Any = None,
    *,
    tokenizer: Any = None,
    sequences: int = 128,
    length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Quantized:
    """Quantise a model's linears by RSQ: rotate, weigh tokens, round with error feedback.

    data: a list of strings (with `tokenizer`), token ids int64 [sequences, length], an iterable of batches (dicts
        of the model's keyword arguments; an `attention_mask` tells pads), or None for the demo's text.
    recipe: `RSQ(...)`, or anything `Recipe.of` takes that has the pass rsq.
    sequences, length, seed: how text is cut: `sequences` windows of `length` tokens, drawn with `seed`.
    folder: keep finished layers there, so that an interrupted run goes on; give each run its own.

    Raises ArgumentError for data that cannot be used, HessianError (naming the linear) for activations that
    cannot be calibrated on, ThresherError for NaN weights, for a rotation that is not exact, and for a model
    that is not one graph.
    """
    config = _config(recipe)
    check_model(model)
    started = time.perf_counter()
    batches = list(_batches(data, tokenizer, sequences, length, batch_size, seed, config))
    if not batches:
        raise ArgumentError("data", "no batch", "at least one sequence", "Give some text.")
    program = _capture(model, batches)
    nothing: list[str] = []
    kept_layers(recover(program), config.keep, nothing)
    for word in config.keep:
        if unnamed(word) in nothing:
            raise names_nothing(config, word, model)
    outcome = rsq_driver.quantise_program(program, batches, config, None if folder is None else Path(folder))
    tensors = rsq.to_statistics(outcome.linears, outcome.plan, config)
    statistics = Statistics(outcome.fingerprint, {"rsq": tensors})
    report = _report(outcome, model, batches, time.perf_counter() - started)
    return Quantized(statistics, report, config)


def _config(recipe: Any) -> RSQConfig:
    if recipe is None:
        return RSQConfig()
    config = Recipe.of(recipe).config("rsq")
    if not isinstance(config, RSQConfig):
        raise ArgumentError("recipe", repr(recipe), "RSQ(...) or a recipe with the pass rsq",
                            "Write thresher.quantize(model, data, RSQ(bits=4)).")  # fmt: skip
    config.validate()
    return config


def _batches(
    data: Any, tokenizer: Any, sequences: int, length: int, size: int, seed: int, config: RSQConfig
) -> Iterator[Batch]:
    if data is None or (isinstance(data, (list, tuple)) and data and all(isinstance(t, str) for t in data)):
        if data is None:
            from .tools.models import texts

            data = texts()
        if tokenizer is None:
            raise ArgumentError(
                "tokenizer", None, "the model's tokenizer", "Text must be tokenized; pass it."
            )
        data = cut_text(data, tokenizer, sequences, length, seed)
    if isinstance(data, str):
        raise ArgumentError("data", "one string", "a list of strings", "Write [text].")
    if isinstance(data, torch.Tensor):
        if data.dim() != 2 or data.is_floating_point() or not data.numel():
            raise ArgumentError("data", f"{data.dtype} {tuple(data.shape)}", "integer token ids [sequences, length]",
                                "Tokenize first, or pass strings.")  # fmt: skip
        tokens = shift_sequences(data.long(), config.expand) if config.expand > 1 else data.long()
        for rows in tokens.split(size):
            yield Batch({"input_ids": rows}, None, rows)
        return
    if not isinstance(data, Iterable):
        raise ArgumentError(
            "data", type(data).__name__, "strings, token ids or batches", "See quantize's help."
        )
    if config.expand > 1:
        raise ArgumentError("rsq option expand", config.expand, "1 for ready-made batches",
                            "Pass a tensor of token ids, or strings.")  # fmt: skip
    for given in data:
        if isinstance(given, torch.Tensor):
            given = {"input_ids": given}
        if not isinstance(given, Mapping) and not hasattr(given, "keys"):
            raise ArgumentError("data", f"a batch of type {type(given).__name__}", "a dict of keyword arguments",
                                "Pass what you would call the model with.")  # fmt: skip
        inputs = {k: v for k, v in dict(given).items() if isinstance(v, torch.Tensor) and k != "labels"}
        mask = inputs.get("attention_mask")
        real = mask != 0 if mask is not None and mask.dim() == 2 else None
        yield Batch(inputs, real, inputs.get("input_ids"))


def cut_text(texts: Sequence[str], tokenizer: Any, sequences: int, length: int, seed: int) -> torch.Tensor:
    """int64 [up to `sequences`, length]: windows of the texts put together, drawn without overlap.

    Raises ArgumentError where the texts do not fill one window; says how many windows there were otherwise.
    """
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", add_special_tokens=False, verbose=False)[
        "input_ids"
    ][0]
    windows = len(ids) // length
    if windows == 0:
        raise ArgumentError("data", f"text of {len(ids)} tokens", f"at least one sequence of {length} tokens",
                            f"Give more text, or length={max(1, len(ids))}.")  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(0, len(ids) - windows * length + 1, (1,), generator=make))
    order = torch.randperm(windows, generator=make)[:sequences]
    return ids[offset : offset + windows * length].reshape(windows, length)[order]


def _capture(model: torch.nn.Module, batches: Sequence[Batch]) -> Program:
    """The model as one program that takes any batch and length. It runs nothing."""
    programs: list[Program] = []

    def look(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        programs.append(capture.from_dynamo(gm, inputs)[0])
        return gm.forward

    given = dict(batches[0].inputs)
    rows = next(iter(given.values())).shape[0]
    if rows == 1:  # one row would be taken for a constant
        given = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in given.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = {k: v.to(device)[:2] if v.shape[0] > 2 else v.to(device) for k, v in given.items()}
    with without_cache(model):
        shown_to(look, model, dynamic=True)(**given)
    if len(programs) != 1:
        raise ThresherError(
            f"The model was captured in {len(programs)} graphs, and quantizing needs one. "
            "torch._dynamo.explain(model)(...) shows where it breaks."
        )
    return programs[0]


def _report(
    outcome: Outcome, model: torch.nn.Module, batches: Sequence[Batch], seconds: float
) -> QuantizeReport:
    total = sum({t.data_ptr(): t.numel() * t.element_size() for t in model.parameters()}.values())
    tokens = sum(
        int(b.real.sum()) if b.real is not None else next(iter(b.inputs.values())).numel() for b in batches
    )
    return QuantizeReport(
        list(outcome.reports.values()), dict(outcome.importance), dict(outcome.bits), dict(outcome.sensitivity),
        list(outcome.plan.notes), list(outcome.plan.missed), outcome.exact, total, tokens, seconds,
    )  # fmt: skip
