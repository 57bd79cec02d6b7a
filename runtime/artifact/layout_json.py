"""A packed program's layout as JSON and back: what runs around the body, and where its inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch

from thresher.graph.call_rules import Rule
from thresher.graph.packed_layout import (
    Counted,
    Gather,
    PackedLayout,
    Packing,
    Passed,
    PlanField,
    Scatter,
    Visibility,
)
from thresher.graph.program import Program

from .program_json import ArtifactError, decode, encode

_KINDS = {kind.__name__.lower(): kind for kind in (Gather, PlanField, Scatter, Passed)}
_TYPES = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "float": (int, float),
    "int | None": (int, type(None)),
}
_PARTS = ("prologue", "epilogue", "padded")
_KNOWN = {*_PARTS, "mask", "tokens", "arguments", "epilogue_arguments", "results", "visibilities", "masks",
          "reclassify", "proven", "packing", "extras", "rewritten", "holes"}  # fmt: skip


def prove(layout: PackedLayout, longest: int) -> None:
    """Evaluate the attention masks at doubled lengths up to `longest`, while the model's own are at hand."""
    if layout.reclassify is None:
        return
    length = layout.proven
    while length < longest:
        length = min(2 * length, longest)
        if {**layout.visibilities, **layout.reclassify(length)} != layout.visibilities:
            break
        layout.proven = length


def encode_layout(layout: PackedLayout, hold: Callable[[torch.Tensor], int]) -> dict[str, Any]:
    """The layout as a JSON value; `hold` as in `encode`."""
    parts = {name: getattr(layout, name) for name in _PARTS}
    for field in fields(layout):
        if field.name not in _KNOWN and getattr(layout, field.name) != field.default:
            raise ArtifactError(f"The packed layout's {field.name!r} has no place in the file format yet.")
    return {
        "mask": layout.mask,
        "tokens": layout.tokens,
        "arguments": [
            {"kind": "counted", "of": encode_rule(a.of, hold)} if isinstance(a, Counted) else _write(a)
            for a in layout.arguments
        ],
        "epilogue_arguments": [_write(a) for a in layout.epilogue_arguments],
        "results": [_write(r) for r in layout.results],
        "extras": [_write(r) for r in layout.extras],
        "visibilities": {site: asdict(v) for site, v in layout.visibilities.items()},
        "masks": list(layout.masks),
        "proven": layout.proven,
        "bounded": layout.reclassify is not None,
        "packing": asdict(layout.packing),
        "rewritten": layout.rewritten,
        "holes": layout.holes,
        **{name: encode(part, hold) if part is not None else None for name, part in parts.items()},
    }


def decode_layout(data: Mapping[str, Any], tensors: list[torch.Tensor]) -> PackedLayout:
    """The layout again. Beyond the proven length every call runs padded: the mask cannot be evaluated here."""
    programs = {name: decode(data[name], tensors) if data[name] is not None else None for name in _PARTS}
    padded = programs["padded"]
    assert padded is not None
    return PackedLayout(
        mask=data["mask"],
        tokens=data["tokens"],
        prologue=programs["prologue"],
        arguments=[
            Counted(decode_rule(a["of"], tensors)) if a["kind"] == "counted" else _read(a)
            for a in data["arguments"]
        ],
        epilogue=programs["epilogue"],
        epilogue_arguments=[_read(a) for a in data["epilogue_arguments"]],
        results=[_read(r) for r in data["results"]],
        padded=padded,
        visibilities={site: _typed(Visibility, v) for site, v in data["visibilities"].items()},
        masks=tuple(data["masks"]),
        reclassify=_unknown if data["bounded"] else None,
        proven=data["proven"],
        packing=_typed(Packing, data.get("packing", {})),
        extras=tuple(_read(r) for r in data.get("extras", ())),
        rewritten=data.get("rewritten", False),
        holes=data.get("holes", True),
    )


def encode_rule(rule: Any, hold: Callable[[torch.Tensor], int]) -> dict[str, Any]:
    """A rule as a JSON value. Raises ArtifactError for other code: a file can name functions and not hold them."""
    if not isinstance(rule, Rule):
        raise ArtifactError(
            f"A pass decides at each call by {rule}, which is no `thresher.graph.call_rules.Rule`."
        )
    part = encode(rule.program, hold) if rule.program is not None else None
    return {"name": rule.name, "facts": dict(rule.facts), "program": part}


def decode_rule(data: Mapping[str, Any], tensors: list[torch.Tensor]) -> Rule:
    """The rule again, from its name, facts and program; see `encode_rule`."""
    program = decode(data["program"], tensors) if data["program"] is not None else None
    return Rule(data["name"], data["facts"], program)


def programs_of(data: Any) -> Iterator[dict[str, Any]]:
    """The encoded programs of one artifact, wherever they are in it."""
    if isinstance(data, Mapping) and "nodes" in data and "symbols" in data:
        yield dict(data)
    elif isinstance(data, (Mapping, list)):
        for part in data.values() if isinstance(data, Mapping) else data:
            yield from programs_of(part)


def _unknown(length: int) -> dict[str, Visibility]:
    return {"": Visibility("unknown")}


def _write(where: Any) -> dict[str, Any]:
    return {"kind": type(where).__name__.lower(), **asdict(where)}


def _read(data: Mapping[str, Any]) -> Any:
    return _typed(_KINDS[data["kind"]], {k: v for k, v in data.items() if k != "kind"})


def _typed(kind: Any, given: Mapping[str, Any]) -> Any:
    """A frozen dataclass of plain values, each of the type it is declared with. Raises ArtifactError."""
    made = kind(**given)
    for each in fields(made):
        held = getattr(made, each.name)
        if type(held) not in _TYPES[str(each.type)]:
            raise ArtifactError(
                f"the layout's {kind.__name__} has {each.name}={held!r}, which is no {each.type}"
            )
    return made


def check_places(layout: PackedLayout, body: Program) -> None:
    """Raise ArtifactError unless all that a layout takes from somewhere is there."""
    counts = {"input": len(layout.padded.placeholders), "body": len(body.outputs)}
    for name in ("prologue", "epilogue"):
        part = getattr(layout, name)
        counts[name] = len(part.outputs) if part is not None else 0
    wanted = [
        ("input", layout.mask),
        ("input", layout.tokens),
        *(("prologue", index) for index in layout.masks),
    ]
    for where in (*layout.arguments, *layout.epilogue_arguments, *layout.results, *layout.extras):
        if isinstance(where, (Gather, Scatter, Passed)):
            wanted.append((getattr(where, "origin", "body"), where.index))
    for origin, index in wanted:
        if type(index) is not int or not 0 <= index < counts.get(origin, 0):
            raise ArtifactError(
                f"the layout takes {index!r} from {origin!r}, which gives {counts.get(origin, 0)}"
            )
