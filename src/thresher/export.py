"""The ways out: `save` and `load` an artifact, `export_onnx` a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.lowering.onnx.check import compare
from thresher.lowering.onnx.export import Exported, reader_of, require_onnx
from thresher.lowering.onnx.export import export as onnx_export
from thresher.lowering.onnx.stages import Stages
from thresher.lowering.onnx.translate import NumberReadError
from thresher.lowering.raised import Raised
from thresher.lowering.reference import Reference
from thresher.lowering.target import Lowered, Target
from thresher.runtime.artifact import file as artifact
from thresher.runtime.artifact.loaded import Loaded
from thresher.runtime.call_session import WHOLE, CallSession
from thresher.runtime.compare import run_with_extras
from thresher.runtime.packing.plan import plan
from thresher.runtime.session import Session

from . import backend, sessions
from .errors import ArgumentError, ThresherError
from .export_example import captured, fixed
from .files import check_writable
from .graph.call_plan import refuse_to_keep
from .graph.program import Program
from .model_capture import example
from .notices import warn
from .recipe import Recipe
from .records.certificate import plain
from .report import Report
from .saving import current, names_of
from .strict import check_model
from .undone import rewrote_nothing


def save(
    what: Any,
    path: str | os.PathLike[str],
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    compiled: bool = False,
    longest: int = 2048,
) -> Path:
    """Save a compiled model, or a Program, as one file for `thresher.load`.

    what: the result of `thresher.compile`, or a Program.
    example_inputs: a call of the compiled model; it decides which of its graphs is saved (a model compiled
        for several kinds of shape has several), and what its results are called. Not needed for a Program.
    compiled: also store machine code for this CPU, for `load(..., target="compiled", allow_compiled=True)`.
    longest: sequence length up to which a packed model's attention masks are proven now.

    A model whose calls are looked at first (token pruning) is saved with the programs that its calls have needed so
    far, and one that leaves nothing out, for others: call it with every kind of input before saving it.

    Raises ThresherError for a model with graph breaks: the Python code between its graphs cannot be saved.
    """
    check_writable("path", Path(path))
    if isinstance(what, Program):
        return artifact.write(what, path, compiled=compiled, longest=longest)
    if not hasattr(what, "sessions") or not isinstance(what.model, torch.nn.Module):
        raise ArgumentError(
            "what",
            type(what).__name__,
            "the result of thresher.compile, or a Program",
            "Compile the model first.",
        )
    if example_inputs is None:
        raise ArgumentError("example_inputs", None, "a dict of keyword arguments or a tuple of positional ones",
                            "Pass a call of the compiled model; its results' names are taken from it.")  # fmt: skip
    is_mapping = isinstance(example_inputs, Mapping) or hasattr(example_inputs, "keys")
    looking = [s for s in what.sessions if isinstance(s, CallSession)]
    try:
        for each in looking:
            each.keep_inputs = True
        with sessions.watch() as calls:
            result = what(**example_inputs) if is_mapping else what(*example_inputs)  # type: ignore[arg-type]
        if len(calls) != 1:
            raise ThresherError(
                f"The model runs as {len(calls)} graphs, with Python code between them that cannot be saved. "
                "Compile a model without graph breaks; TORCH_LOGS=graph_breaks names them."
            )
        session, results, live = calls[0].session, calls[0].results, calls[0].weights
        program = current(session.program, live)
        others, whole = {}, None
        if isinstance(session, CallSession):
            with torch.no_grad():
                whole = current(session.whole(session.inputs).program, live)
            others = {key: current(s.program, live) for key, s in session.variants.items() if key != WHOLE}
    finally:  # also where the call raises: inputs are not held longer than they are needed
        for each in looking:
            each.keep_inputs, each.inputs = False, []
    return artifact.write(
        program,
        path,
        report=session.report,
        recipe=what.recipe.to_dict(),
        certificate=plain(session.certificate.to_dict()) if session.certificate is not None else None,
        output_names=names_of(result, results),
        compiled=compiled,
        longest=longest,
        others=others,
        whole=whole,
    )


def load(
    path: str | os.PathLike[str],
    target: str = "inductor",
    *,
    allow_compiled: bool = False,
    wait: bool = False,
    **options: Any,
) -> Loaded:
    """Load a saved model; call the result with the model's inputs. See `runtime.artifact.read`.

    wait: have the first call wait for the compiler. Without, the program runs node by node until it is compiled in the
        background, so that the first result is there at once.
    options: the target's own, as for `compile`: build_only, profiles and builder of "tensorrt".
    """
    return artifact.read(path, target, allow_compiled=allow_compiled, options=options, wait=wait)


def export_onnx(
    model: torch.nn.Module | Program,
    args: Mapping[str, Any] | Sequence[Any],
    path: str | os.PathLike[str],
    recipe: Any = None,
    *,
    dynamic_shapes: Any = None,
    runtime: str = "ort",
    body_only: bool = False,
    accuracy_level: int = 0,
    table_bits: int = 0,
    check: bool = True,
    **options: Any,
) -> Exported:
    """Rewrite a model by a recipe and write it as ONNX; run the file on three input sizes and compare.

    model: a module in eval mode, or a Program already rewritten. args: example inputs, as for `compile`; they
        verify the passes and are the first size the file is run on.
    recipe, options: as for `compile`. dynamic_shapes: as for torch.export; by default the first two dimensions
        of every example input vary where the model allows it.
    runtime, body_only, accuracy_level, table_bits: see `lowering.onnx.export`.
    check: run the file with ONNX Runtime or onnx.reference; the differences stand in the record.

    A pass that settles something for each call (`transprune`, `zipvl`) must be told it in the recipe: `choice`.

    Raises ThresherError for what cannot be exported.
    """
    if not isinstance(model, Program):
        check_model(model)
    require_onnx()
    reader_of(runtime, accuracy_level, table_bits)
    check_writable("path", Path(path))
    positional, named = example(args)
    with Stages() as stage:
        if isinstance(model, Program):
            program, names = model, None
            if program.updates:
                raise ArgumentError(
                    "model",
                    f"a program that writes to its inputs ({program.input_names[next(iter(program.updates.values()))]})",
                    "a program that only returns results",
                    "Capture the model without a static cache.",
                )
            refuse_to_keep(program, "model", program.calls.choices if program.calls is not None else ())
            outside = program.packing.padded if program.packing is not None else program
            given = [*positional, *named.values()]
            inputs = [named.get(n, given[i]) for i, n in enumerate(outside.input_names)] if given else []
        else:
            stage("capturing the model")
            program, names, inputs = captured(model, positional, named, dynamic_shapes)
            stage("rewriting")
            whole, chosen = program, Recipe.of(recipe, **options)
            program = _rewritten(whole, chosen, inputs)

        def written(program: Program) -> Exported:
            return onnx_export(
                program, Path(path), runtime=runtime, body_only=body_only, accuracy_level=accuracy_level,
                table_bits=table_bits, output_names=names, stage=stage,
            )  # fmt: skip

        if program.calls is not None:
            names = _with_extras(program, names)
        try:
            record = written(program)
        except NumberReadError as reason:
            if program.packing is None or body_only or isinstance(model, Program):
                raise
            chosen = dataclasses.replace(
                chosen, passes=tuple(c for c in chosen.passes if c.name != "prepack"), require=()
            )
            program = _rewritten(whole, chosen, inputs)
            record = written(program)
            record.notes.append(f"It is written without prepacking. {str(reason).split(', and')[0]}.")
        for name, choice in program.calls.choices.items() if program.calls is not None else ():
            record.notes.append(
                f"{name} uses the choice {choice.made}, made for the example, in every call of the file."
            )
        if check and inputs:
            stage("running the file and the program")
            record.differences, notes = compare(Path(path), _calls(program, inputs, record, body_only))
            record.notes += notes
        record.notes += fixed(program)
    return record


def _rewritten(program: Program, recipe: Recipe, inputs: list[Any]) -> Program:
    """The program by a recipe, with a warning when nothing was rewritten."""
    with torch.no_grad():
        program, report = backend.run_pipeline(program, recipe, inputs)
    settled = [c.name for c in recipe.passes if getattr(c, "choice", None) is not None]
    refuse_to_keep(program, "recipe", settled)
    if report.passes and not report.rewritten:
        warn(f"thresher rewrote nothing: {rewrote_nothing([report])}", stacklevel=3)
    return program


def _calls(program: Program, inputs: Sequence[Any], record: Exported, body_only: bool) -> list[Any]:
    """The example inputs at three sizes, with the Program's results."""
    layout = program.packing
    outside = layout.padded if layout is not None else program
    plain = Raised(torch.float32) if record.widened else Reference()
    calls = []
    for sized in _sizes(outside, inputs):
        mask = sized[layout.mask] != 0 if layout is not None else None
        if layout is not None and body_only:
            fields, results = packed_call(program, sized, plain)
            calls.append(({n: fields[n] for n in record.inputs}, results, None))
            continue
        with torch.no_grad():
            results = run_with_extras(program, sized, plain)
        calls.append((dict(zip(outside.input_names, sized, strict=True)), results, mask))
    return calls


def _with_extras(program: Program, names: list[str] | None) -> list[str]:
    """Names of all results of a program that gives more than the caller's, such as which tokens were kept."""
    extra = program.calls.extra_outputs
    if program.calls.extra_inputs:
        raise ThresherError(
            "The program reads token types given around the call (thresher.token_types), which a file has no input for. "
            "Say which tokens are an image's by image_token_id or image_span."
        )
    own = len(program.outputs) - len(extra)
    return [*(names or (f"output_{i}" for i in range(own))), *extra]


def packed_call(program: Program, inputs: Sequence[Any], plain: Target) -> tuple[dict[str, Any], list[Any]]:
    """What a packed program's body is given for a padded call, by name, and its results by a plain target."""
    seen: list[Any] = []

    class Watched(Reference):
        def lower(self, part: Program) -> Lowered:
            lowered = plain.lower(part)
            if part is not program:
                return lowered

            def run(given: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
                results = lowered.run(given, weights)
                seen[:] = [list(given), results]
                return results

            return dataclasses.replace(lowered, run=run)

    Session(program, Watched(), plain, Report("none"))(inputs, {})
    if not seen:
        raise ThresherError(
            "The example call cannot be packed, so there is nothing to compare the body with."
        )
    fields = dict(zip(program.input_names, seen[0], strict=True))
    layout = program.packing
    fields.setdefault("columns", plan(inputs[layout.mask]).cols)
    return fields, seen[1]


def _sizes(program: Program, inputs: Sequence[Any]) -> list[list[Any]]:
    """The inputs as given, then with each varying dimension larger and smaller, by repeating and cutting."""
    found = []
    for grow in (lambda n, _: n, lambda n, low: n + 3, lambda n, low: max(low, n // 2)):
        sized = []
        for place, tensor in zip(program.placeholders, inputs, strict=True):
            known = place.meta["val"]
            if isinstance(tensor, torch.Tensor):
                for dim, size in enumerate(known.shape):
                    if isinstance(size, torch.SymInt):
                        new = grow(tensor.shape[dim], 2)
                        tensor = tensor.index_select(dim, torch.arange(new) % tensor.shape[dim])
            sized.append(tensor)
        found.append(sized)
    return found
