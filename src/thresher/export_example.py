"""The example that a model is exported by: how it is captured, and what is said of sizes and types that stay fixed."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .graph.capture import constant_inputs
from .graph.program import Program
from .model_capture import exported, without_cache


def captured(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[Program, list[str], list[Any]]:
    """The model's Program, its results' names, and the example inputs in the order of its placeholders."""
    if dynamic_shapes is None:
        twice = _more_than_one((args, kwargs))
        if twice is not None:
            with contextlib.suppress(
                CaptureError
            ):  # a model that takes one row only; the record says what is fixed
                return captured(model, twice[0], twice[1], None)
    shapes = dynamic_shapes
    if shapes is None:
        shapes = pytree.tree_map(_free, (args, kwargs))
        shapes = {**dict(zip(_parameters(model), shapes[0])), **shapes[1]}
    holds_cache = any(not isinstance(v, torch.Tensor) for v in (*args, *kwargs.values()))
    with contextlib.nullcontext() if holds_cache else without_cache(model):
        program, whole = exported(model, args, kwargs, shapes)
    spec = whole.call_spec.out_spec
    flat, _ = pytree.tree_flatten((args, kwargs))
    kind, constants = torch.export.graph_signature.InputKind.USER_INPUT, constant_inputs(whole)
    names = [s.arg.name for s in whole.graph_signature.input_specs if s.kind == kind]
    read = [x for name, x in zip(names, flat, strict=True) if name not in constants]
    return program, _flat_names(spec), read


def _more_than_one(given: Any) -> Any:
    """Example inputs of one row as two, since torch.export takes a size of one for a constant; None for others."""
    tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor) and t.dim()]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return None
    twice = functools.partial(torch.Tensor.repeat_interleave, repeats=2, dim=0)
    return pytree.tree_map_only(torch.Tensor, lambda t: twice(t) if t.dim() else t, given)


def _free(given: Any) -> dict[int, Any] | None:
    """Both of the first two dimensions may vary, if the model lets them."""
    if not isinstance(given, torch.Tensor):
        return None
    return {dim: torch.export.Dim.AUTO for dim in range(min(2, given.dim()))}


def _parameters(model: torch.nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _flat_names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each leaf of an exported program's result."""
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    leaves, _ = pytree.tree_flatten_with_path(numbered)
    return [pytree.keystr(path).strip(".[]'\"").replace("']['", ".") or "output" for path, _ in leaves]


def fixed(program: Program) -> list[str]:
    """What to say of inputs whose first two dimensions have one size in the file."""
    outside = program.packing.padded if program.packing is not None else program
    said = []
    for name, place in zip(outside.input_names, outside.placeholders, strict=True):
        known = place.meta.get("val")
        if isinstance(known, torch.Tensor):
            fixed = [f"dimension {d} at {n}" for d, n in enumerate(known.shape[:2]) if isinstance(n, int)]
            said += [f"{name} keeps {' and '.join(fixed)} in the file."] if fixed else []
    return said
