"""The ways out: `save` and `load` an artifact, `export_onnx` a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import sessions
from .certificate import plain
from .errors import ArgumentError, ThresherError
from .program import Program, Weight
from .runtime import artifact
from .runtime.freshness import Freshness
from .runtime.loaded import Loaded


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

    Raises ThresherError for a model with graph breaks: the Python code between its graphs cannot be saved.
    """
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
    with sessions.watch() as calls:
        result = what(**example_inputs) if is_mapping else what(*example_inputs)
    if len(calls) != 1:
        raise ThresherError(
            f"The model runs as {len(calls)} graphs, with Python code between them that cannot be saved. "
            "Compile a model without graph breaks; TORCH_LOGS=graph_breaks names them."
        )
    ((session, results),) = calls
    live = {**dict(what.model.named_parameters(remove_duplicate=False)), **dict(what.model.named_buffers())}
    program = _current(session.program, live)
    return artifact.write(
        program,
        path,
        report=session.report,
        recipe=what.recipe.to_dict(),
        certificate=plain(session.certificate.to_dict()) if session.certificate is not None else None,
        output_names=_names(result, results),
        compiled=compiled,
        longest=longest,
    )


def load(path: str | os.PathLike[str], target: str = "inductor", *, allow_compiled: bool = False) -> Loaded:
    """Load a saved model; call the result with the model's inputs. See `runtime.artifact.read`."""
    return artifact.read(path, target, allow_compiled=allow_compiled)


def _names(result: Any, results: Sequence[Any]) -> list[str]:
    """The place of each of a graph's results in what the model returned: `logits`, `past_key_values.0.keys`."""
    places: dict[int, str] = {}
    _name(result, "", places)
    return [places.get(id(r), f"output_{i}") for i, r in enumerate(results)]


def _name(value: Any, path: str, places: dict[int, str], depth: int = 0) -> None:
    if isinstance(value, torch.Tensor):
        places.setdefault(id(value), path or "output")
    elif depth < 6:
        if isinstance(value, Mapping):
            parts = list(value.items())
        elif isinstance(value, (list, tuple)):
            parts = list(enumerate(value))
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            parts = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
        else:
            parts = []
        for key, part in parts:
            _name(part, f"{path}.{key}" if path else str(key), places, depth + 1)


def _current(program: Program, live: Mapping[str, torch.Tensor]) -> Program:
    """The program with the model's weights as they are now, packed ones recomputed where needed."""
    copy = program.copy()
    names = list(copy.weights)
    tensors, _ = Freshness(program, "check").tensors(names, _by_suffix(program, live))
    for name, tensor in zip(names, tensors, strict=True):
        copy.weights[name] = Weight(copy.weights[name].fqn, tensor)
        copy.graph_module._buffers[name] = tensor
    layout = program.packing
    if layout is not None:
        parts = {n: getattr(layout, n) for n in ("prologue", "epilogue", "padded")}
        parts = {n: _current(p, live) if p is not None else None for n, p in parts.items()}
        copy.packing = dataclasses.replace(layout, **parts)
    return copy


def _by_suffix(program: Program, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The live tensors under the names the program uses for them."""
    wanted = {f for w in program.weights.values() for f in (w.fqn, *w.source)}
    return {name: live[name] for name in wanted if name in live}


def _flat_names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each leaf of an exported program's result."""
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    leaves, _ = pytree.tree_flatten_with_path(numbered)
    return [pytree.keystr(path).strip(".[]'\"").replace("']['", ".") or "output" for path, _ in leaves]
