"""`thresher.quantize`: low-bit weights from a model and some text, in one call.

    low = thresher.quantize(model, texts, RSQ(bits=3), tokenizer=tokenizer)
    print(low.report)
    low.save("model-3bit.safetensors")                      # codes, for compile; or, for others:
    low.save_pretrained("model-3bit")                       # a model
    compiled = thresher.compile(model, example_inputs, **low.options)
    compiled = torch.compile(model, backend="thresher", options=low.options)

The model itself is not changed. The file holds codes and scales; it belongs to the weights it was made from,
and is refused for others.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import torch

from thresher.passes.calibrate import Statistics
from thresher.passes.keep import kept_layers, unnamed
from thresher.passes.rsq import rsq
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer.driver import Driver
from thresher.passes.rsq.quantizer.estimate import Estimate
from thresher.passes.rsq.quantizer.outcome import Outcome
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.ranks import Ranks
from thresher.passes.rsq.quantizer.states import Keeping, check_place
from thresher.passes.structure.recover import recover

from .calibration_data import batches_of, is_text
from .errors import ArgumentError, ThresherError
from .files import cache_folder
from .graph.program import Program
from .hashing import of_tensors
from .low_bit.checkpoint import push, with_codes, write
from .low_bit.fuse import portable as fusable
from .machine.memory import give_back
from .mapped_model import MappedModel, source_of, tokenizer_of
from .model_capture import graphs, without_cache
from .recipe import Recipe
from .records.quantization_report import QuantizeReport
from .strict import check_model, names_nothing
from .tensor_files import need_room, release

RSQ = RSQConfig
_log = logging.getLogger(__name__)


@dataclass
class Quantized:
    """What `quantize` made. statistics: as compile reads it. report: what it cost and saved. model: the one it was made
    for, with its own weights; of a directory, as it was read from there. program: that model as it was captured, which
    takes as long as a forward of many layers takes to trace; None where its weights lie in files."""

    statistics: Statistics
    report: QuantizeReport
    config: RSQConfig
    path: Path | None = field(default=None)
    model: torch.nn.Module | None = field(default=None, repr=False)
    example: Batch | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    program: Program | None = field(default=None, repr=False)

    def as_model(self) -> Any:
        """A copy of the model with the codes in its linears and the rotations in its weights, run by our operators.

        Raises ArgumentError where a rotation cannot be in weights (`rotate_down`, layer norms), with the option that
        leaves it out; `thresher.quantize(..., portable=True)` leaves those out from the start.
        """
        return self._made(shared=False)

    def _made(self, shared: bool) -> Any:
        """The same; shared: with the model's own tensors where they stay as they are, to be written and not changed."""
        model = self.model
        if model is None or not hasattr(model, "save_pretrained") or self.example is None:
            raise ArgumentError("model", type(model).__name__, "a transformers model that thresher.quantize was given",
                                "Save the codes by .save.")  # fmt: skip
        program = _capture(model, [self.example]) if self.program is None else self.program
        return with_codes(model, program, self.config, self.statistics["rsq"], shared)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Write the model as compressed-tensors with its config and tokenizer (the one quantized with, or this one), for
        transformers, vLLM and `thresher.integrations.transformers.from_pretrained`. Raises as `as_model`."""
        made = self._made(shared=True)
        return write(made, folder, tokenizer if tokenizer is not None else self.tokenizer)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """`save_pretrained` to a repository of the Hugging Face hub, made if need be; its address."""
        return push(self._made(shared=True), self.tokenizer, repo_id, private, token)

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


@overload
def quantize(
    model: torch.nn.Module | MappedModel | str | Path, data: Any = ..., recipe: Any = ..., *, dry_run: Literal[True],
    tokenizer: Any = ..., sequences: int = ..., length: int = ..., batch_size: int = ..., seed: int = ...,
    folder: str | Path | None = ..., weights: str | Path | None = ..., activations: str = ..., narrow: bool = ...,
    portable: bool = ..., group: Any = ...,
) -> Estimate: ...  # fmt: skip


@overload
def quantize(
    model: torch.nn.Module | MappedModel | str | Path, data: Any = ..., recipe: Any = ..., *, dry_run: Literal[False] = ...,
    tokenizer: Any = ..., sequences: int = ..., length: int = ..., batch_size: int = ..., seed: int = ...,
    folder: str | Path | None = ..., weights: str | Path | None = ..., activations: str = ..., narrow: bool = ...,
    portable: bool = ..., group: Any = ...,
) -> Quantized: ...  # fmt: skip


def quantize(
    model: torch.nn.Module | MappedModel | str | Path,
    data: Any = None,
    recipe: Any = None,
    *,
    tokenizer: Any = None,
    sequences: int = 128,
    length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    folder: str | Path | None = None,
    weights: str | Path | None = None,
    activations: str = "memory",
    narrow: bool = False,
    dry_run: bool = False,
    portable: bool = False,
    group: Any = None,
) -> Quantized | Estimate:
    """Quantise a model's linears by RSQ: rotate, weigh tokens, round with error feedback.

    model: a module, or the directory that `save_pretrained` wrote (also as a MappedModel): its weights are then read from
        the files as each layer needs them, and finished layers are files too, so that the model need not fit into memory.
    data: a list of strings (with `tokenizer`; a directory's own is found there), token ids int64 [sequences, length],
        an iterable of batches (dicts of the model's keyword arguments; an `attention_mask` tells pads), or None for the
        demo's text.
    recipe: `RSQ(...)`, or anything `Recipe.of` takes that has the pass rsq.
    sequences, length, seed: how text is cut: `sequences` windows of `length` tokens, drawn with `seed`.
    folder: keep finished layers there, so that an interrupted run goes on and gives the same codes; give each run its
        own. A directory's are kept in the cache by default, for the same model, data and options.
    weights: of a module on meta, the directory of its safetensors files.
    activations: where the calibration batches wait between layers, "memory" or "disk" (in `folder`). narrow: round them
        to bf16 there, which halves an fp32 model's, and multiply in bf16 where the CPU does so in hardware, which halves the
        time of its linears.
    dry_run: run nothing, and return what it would take: memory by part, time, and bytes written.
    portable: leave out the rotations that a saved model (`save_pretrained`) cannot hold, and say which.

    group: a process group of torch.distributed whose ranks all make this call, with the same arguments: each runs a share of
        the batches and rounds a share of the rows, and all of them return the whole. `torch.distributed.group.WORLD`.

    What it will take is said before it starts (logging, level INFO; WARNING where other work has the cores), and kept in the
    report.

    Raises ArgumentError for data that cannot be used, HessianError (naming the linear) for activations that
    cannot be calibrated on, and ThresherError for weights that are missing, truncated, NaN or infinite (naming file and
    tensor), for a disk without room, for a rotation that is not exact, and for a model that is not one graph.
    """
    config = _config(recipe)
    check_place(activations)
    started = time.perf_counter()
    source = source_of(model, weights)
    found: torch.nn.Module = model if source is None else source.model  # type: ignore[assignment]
    check_model(found)
    if source is not None and tokenizer is None and is_text(data):
        tokenizer = tokenizer_of(source.directory)
    batches = list(batches_of(data, tokenizer, sequences, length, batch_size, seed, config))
    if not batches:
        raise ArgumentError("data", "no batch", "at least one sequence", "Give some text.")
    program = _capture(found, batches)
    release()
    left_out: list[str] = []
    if portable:
        config, left_out = fusable(config, program, found)
    nothing: list[str] = []
    kept_layers(recover(program), config.keep, nothing)
    for word in config.keep:
        if unnamed(word) in nothing:
            raise names_nothing(config, word, found)
    keeping = Keeping(
        _folder(folder, source is not None or activations == "disk", config, batches, source),
        activations,
        torch.bfloat16 if narrow else None,
        {} if source is None else {name: str(path) for name, path in source.files.items()},
    )
    driver = Driver(program, batches, config, keeping, Ranks.of(group))
    gc.collect()  # what capturing left behind is more than a small layer
    give_back()
    estimate = driver.estimate()
    if dry_run:
        return estimate
    _log.log(logging.WARNING if estimate.hindered else logging.INFO, "%s", estimate)
    read = time.perf_counter() - started
    if keeping.folder is not None:
        need_room(keeping.folder, estimate.written + estimate.on_disk, "Finished layers and activations")
    outcome = driver.run()
    tensors = rsq.to_statistics(outcome.linears, outcome.plan, config)
    statistics = Statistics(outcome.fingerprint, {"rsq": tensors})
    report = _report(outcome, found, estimate, read, time.perf_counter() - started)
    if source is not None:
        source.settle()
    report.notes[:0] = left_out
    example = Batch({k: v[:2] for k, v in batches[0].inputs.items()})
    kept = program if source is None else None
    return Quantized(statistics, report, config, None, found, example, tokenizer, kept)


def _folder(
    folder: str | Path | None,
    needed: bool,
    config: RSQConfig,
    batches: Sequence[Batch],
    source: MappedModel | None,
) -> Path | None:
    """Where finished layers are kept: the one given, or one in the cache for this model, data and options."""
    if folder is not None or not needed:
        return None if folder is None else Path(folder)
    tensors = [
        (f"{i}.{n}", t)
        for i, b in enumerate(batches)
        for n, t in b.inputs.items()
        if isinstance(t, torch.Tensor)
    ]
    where = "" if source is None else str(source.directory.resolve())
    name = of_tensors(tensors, config.to_json(), where)[:16]
    kept = cache_folder("quantizing")
    return (kept or Path(tempfile.mkdtemp(prefix="thresher-"))) / name


def _config(recipe: Any) -> RSQConfig:
    if recipe is None:
        return RSQConfig()
    config = Recipe.of(recipe).config("rsq")
    if not isinstance(config, RSQConfig):
        raise ArgumentError("recipe", repr(recipe), "RSQ(...) or a recipe with the pass rsq",
                            "Write thresher.quantize(model, data, RSQ(bits=4)).")  # fmt: skip
    config.validate()
    return config


def _capture(model: torch.nn.Module, batches: Sequence[Batch]) -> Program:
    """The model as one program that takes any batch and length. It runs nothing."""
    given = dict(batches[0].inputs)
    rows = next(iter(given.values())).shape[0]
    if rows == 1:  # one row would be taken for a constant
        given = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in given.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = {k: v.to(device)[:2] if v.shape[0] > 2 else v.to(device) for k, v in given.items()}
    with without_cache(model):
        programs = graphs(model, given)
    if len(programs) != 1 or programs[0] is None:
        raise ThresherError(
            f"The model was captured in {len(programs)} graphs, and quantizing needs one. "
            "torch._dynamo.explain(model)(...) shows where it breaks."
        )
    return programs[0]


def _report(
    outcome: Outcome, model: torch.nn.Module, estimate: Estimate, read: float, seconds: float
) -> QuantizeReport:
    total = sum({t.data_ptr(): t.numel() * t.element_size() for t in model.parameters()}.values())
    said = f"Said before it started, {read:.1f} s after the call: {estimate}"
    return QuantizeReport(
        list(outcome.reports.values()), dict(outcome.importance), dict(outcome.bits), dict(outcome.sensitivity),
        [*outcome.plan.notes, said], list(outcome.plan.missed), outcome.exact, total,
        estimate.tokens, seconds,
    )  # fmt: skip
