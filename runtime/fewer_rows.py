"""A program captured for a fixed number of rows, written anew for fewer: a cheap stand-in to prove a rewrite on.

Sizes that a capture fixed stand in the graph as numbers, those of reshapes, expansions and factories. Here each is
changed that must be, told by the shapes which the graph's fakes have. Whether all were told right is not known from that:
whoever uses the result compares it with the rows of the whole program, and runs that where they differ.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from thresher.graph.nodes import value
from thresher.graph.packed_layout import PackedLayout
from thresher.graph.program import Program

aten = torch.ops.aten
_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
_LEADING = ("size", "shape")  # arguments of expansions and factories that hold a result's sizes


class Untold(Exception):
    """A program whose sizes cannot be changed, with the node where that showed."""


def rows_of(program: Program) -> int | None:
    """How many rows the program was captured for, where that is fixed: what all its tensors begin with."""
    known = [value(p) for p in program.placeholders]
    sizes = [s for k in known for s in (k.shape if isinstance(k, torch.Tensor) else (k,))]
    rows = {
        k.shape[0] for k in known if isinstance(k, torch.Tensor) and k.dim() and isinstance(k.shape[0], int)
    }
    fixed = len(rows) == 1 and not any(isinstance(s, torch.SymInt) for s in sizes)
    return rows.pop() if fixed else None


def first_rows(inputs: Sequence[Any], few: int) -> list[Any]:
    """The inputs' first rows."""
    return [x[:few] if isinstance(x, torch.Tensor) and x.dim() else x for x in inputs]


def with_fewer_rows(program: Program, rows: int, few: int) -> Program:
    """The program for `few` rows instead of `rows`; of a packed one without what runs calls padded. Raises Untold where a
    size cannot be told."""
    layout: PackedLayout | None = program.packing
    if layout is None:
        return _resized(program, rows, few)
    if any(isinstance(s, int) and s == rows for p in program.placeholders for s in _shape(value(p))):
        raise Untold("the packed body has as many rows")
    copy = program.copy()
    around = {
        "prologue": layout.prologue,
        "epilogue": layout.epilogue,
    }  # nothing is run padded to prove packing
    made = {name: None if p is None else _resized(p, rows, few) for name, p in around.items()}
    copy.packing = dataclasses.replace(layout, **made)  # type: ignore[arg-type]
    return copy


def _resized(program: Program, rows: int, few: int) -> Program:
    copy, mode = program.copy(), program.fake_mode()
    if mode is None:
        return copy
    with mode, enable_python_dispatcher(), torch.no_grad():
        for node in copy.graph.nodes:
            known = value(node)
            if node.op == "placeholder" and isinstance(known, torch.Tensor) and _shape(known)[:1] == (rows,):
                node.meta["val"] = known.new_empty((few, *known.shape[1:]))
            elif node.op == "call_function":
                _rewrite(node, known, rows, few)
    copy.graph_module.recompile()
    return copy


def _rewrite(node: fx.Node, known: Any, rows: int, few: int) -> None:
    """Change a node's numbers where its arguments have fewer rows now, and give it its new fake."""
    wanted = [_fewer(_shape(k), rows, few) for k in _flat(known)]
    for args in _candidates(node, rows, few):
        given = torch.utils._pytree.tree_map_only(fx.Node, value, (args, dict(node.kwargs)))
        try:
            made = node.target(*given[0], **given[1])  # type: ignore[operator]
        except Exception:
            continue
        if all(_shape(m) in w for m, w in zip(_flat(made), wanted, strict=True)):
            node.args, node.meta["val"] = args, made
            return
    raise Untold(f"{node.target} ({node.name})")


def _candidates(node: fx.Node, rows: int, few: int) -> list[tuple[Any, ...]]:
    """The arguments a node may have for fewer rows, the likeliest first; as they are last."""
    if not isinstance(node.target, torch._ops.OpOverload):
        if node.target is not operator.getitem:
            raise Untold(str(node.target))
        return [node.args]
    found: list[tuple[Any, ...]] = []
    for at, (given, spec) in enumerate(zip(node.args, node.target._schema.arguments)):
        if isinstance(given, (list, tuple)) and spec.name in _LEADING:
            places = range(len(given)) if node.target in _RESHAPES else range(min(1, len(given)))
            for place in places:
                if isinstance(given[place], int) and given[place] > 0 and given[place] % rows == 0:
                    changed = [*given[:place], given[place] // rows * few, *given[place + 1 :]]
                    found.append((*node.args[:at], changed, *node.args[at + 1 :]))
        elif spec.name == "end" and given == rows and "arange" in node.target._schema.name:
            found.append((*node.args[:at], few, *node.args[at + 1 :]))
    return [*found, node.args]


def _fewer(shape: tuple[Any, ...], rows: int, few: int) -> list[tuple[Any, ...]]:
    """The shapes that a result of this shape may have for fewer rows."""
    scaled = [
        (*shape[:d], size // rows * few, *shape[d + 1 :])
        for d, size in enumerate(shape)
        if isinstance(size, int) and size and size % rows == 0
    ]
    return [*scaled, shape]


def _flat(known: Any) -> list[Any]:
    return list(known) if isinstance(known, (tuple, list)) else [known]


def _shape(known: Any) -> tuple[Any, ...]:
    return tuple(known.shape) if isinstance(known, torch.Tensor) else ()
