"""What a saved program takes and gives: its inputs by name, checked; its sizes, found in the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher.errors import ArgumentError
from thresher.graph.nodes import value
from thresher.graph.program import Program

from . import expressions
from .program_json import ArtifactError


def describe_inputs(program: Program) -> list[dict[str, Any]]:
    """One entry for each placeholder: a tensor the caller gives, a size read off one, or one nobody reads."""
    places = program.placeholders
    entries: list[dict[str, Any]] = []
    for node, name in zip(places, program.input_names):
        known = value(node)
        if isinstance(known, torch.Tensor):
            if not node.users and known.dim() == 0:  # a number that the graph holds as a constant
                entries.append({"name": name, "kind": "unused"})
                continue
            shape = [expressions.write(s) for s in known.shape]
            entry: dict[str, Any] = {
                "kind": "tensor",
                "dtype": str(known.dtype).removeprefix("torch."),
                "shape": shape,
            }
            entries.append({"name": name, **entry, "device": known.device.type})
        elif isinstance(known, torch.SymInt):
            entries.append({"name": name, "kind": "size", "size": expressions.write(known)})
        else:
            entries.append({"name": name, "kind": "number", "value": known})
    return entries


def check_described(manifest: Mapping[str, Any], symbols: Mapping[str, Any], places: int | None) -> None:
    """Raise ArtifactError unless `bind` can read what a file says of its inputs, outputs and sizes.

    symbols: the range of each size. places: how many inputs the program has, where that is known.
    """
    for name, facts in symbols.items():
        if type(facts["hint"]) is not int or type(facts["min"]) is not int or not _whole(facts["max"]):
            raise ArtifactError(f"the range of the size {name} is {facts}")
    known = dict.fromkeys(symbols, 7)
    entries = manifest["inputs"]
    if places is not None and len(entries) != places:
        raise ArtifactError(f"it describes {len(entries)} inputs, and the program takes {places}")
    for entry in entries:
        name, kind = entry["name"], entry["kind"]
        if not isinstance(name, str) or kind not in ("tensor", "size", "number", "unused"):
            raise ArtifactError(f"an input is called {name!r} and is a {kind!r}")
        if kind == "tensor" and not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
            raise ArtifactError(f"the input {name} has the dtype {entry['dtype']!r}")
        if kind == "tensor":
            torch.device(entry["device"])
        sizes = entry["shape"] if kind == "tensor" else [entry["size"]] if kind == "size" else []
        if not all(type(size) in (int, str) for size in sizes):
            raise ArtifactError(f"the input {name} has the sizes {sizes}")
        for size in sizes:
            expressions.evaluate(size, known)
    if not all(isinstance(name, str) for name in manifest["outputs"]):
        raise ArtifactError("an output has no name")
    for text in manifest["relations"]:
        if not isinstance(text, str) or not expressions.readable(text):
            raise ArtifactError(f"it relates the sizes by {text!r}")
        expressions.evaluate(text, known)  # of these sizes and no others


def _whole(limit: Any) -> bool:
    return limit is None or type(limit) is int


def bind(
    entries: Sequence[Mapping[str, Any]],
    relations: Sequence[str],
    symbols: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[Any]:
    """The program's arguments from the caller's. Raises ArgumentError naming the input that does not fit.

    symbols: the range of each size that may vary.
    """
    wanted = [e for e in entries if e["kind"] == "tensor"]
    names = [e["name"] for e in wanted]
    given = dict(zip(names, args))
    if len(args) > len(names) or set(given) & set(kwargs) or set(kwargs) - set(names):
        surplus = [*sorted(set(kwargs) - set(names)), *sorted(set(given) & set(kwargs))]
        raise ArgumentError("inputs", ", ".join(surplus) or f"{len(args)} tensors", ", ".join(names),
                            "Pass each of them once, by name or in this order.")  # fmt: skip
    given.update(kwargs)
    missing = [n for n in names if n not in given]
    if missing:
        raise ArgumentError(missing[0], "nothing", "a tensor", f"This program takes {', '.join(names)}.")
    sizes: dict[str, int] = {}
    for entry in wanted:
        _check(entry, given[entry["name"]], sizes, symbols)
    for text in relations:
        if set(_names(text, symbols)) <= set(sizes) and not expressions.evaluate(text, sizes):
            raise ArgumentError("inputs", f"sizes {sizes}", f"sizes with {text}",
                                "The graph was captured under this condition.")  # fmt: skip
    return [_argument(e, given, sizes) for e in entries]


def _names(text: str, symbols: Mapping[str, Any]) -> list[str]:
    import re

    return [n for n in re.findall(r"[A-Za-z_]\w*", text) if n in symbols]


def _check(entry: Mapping[str, Any], tensor: Any, sizes: dict[str, int], symbols: Mapping[str, Any]) -> None:
    name, shape = entry["name"], entry["shape"]
    if not isinstance(tensor, torch.Tensor) or str(tensor.dtype) != f"torch.{entry['dtype']}":
        given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ArgumentError(name, given, f"a tensor of {entry['dtype']}", "Convert it first.")
    if tensor.device.type != entry["device"]:
        raise ArgumentError(
            name, f"a tensor on {tensor.device}", f"one on {entry['device']}", "Move it there."
        )
    fits = tensor.dim() == len(shape)
    for expected, size in zip(shape, tensor.shape) if fits else ():
        if isinstance(expected, str) and expected in symbols:
            limits = symbols[expected]
            known = sizes.setdefault(expected, size)
            fits &= (
                known == size and size >= limits["min"] and (limits["max"] is None or size <= limits["max"])
            )
        elif isinstance(expected, int):
            fits &= expected == size
    if not fits:
        ranges = ", ".join(
            f"{n} from {r['min']}" + (f" to {r['max']}" if r["max"] is not None else "")
            for n, r in symbols.items()
            if n in shape
        )
        bound = (
            f" (already {', '.join(f'{k} = {v}' for k, v in sizes.items() if k in shape)})" if sizes else ""
        )
        raise ArgumentError(
            name,
            f"shape {list(tensor.shape)}",
            f"[{', '.join(map(str, shape))}]" + (f" with {ranges}{bound}" if ranges else ""),
            "Save a model compiled for these sizes.",
        )


def _argument(entry: Mapping[str, Any], given: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    if entry["kind"] == "tensor":
        return given[entry["name"]]
    if entry["kind"] == "size":
        return expressions.evaluate(entry["size"], sizes)
    if entry["kind"] == "number":
        return entry["value"]
    return torch.zeros(())
