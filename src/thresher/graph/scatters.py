"""A fresh tensor that is filled slice by slice, as functional code has it, is its parts put together.

    y = new_empty(n); y = slice_scatter(y, a, d, 0, k); y = slice_scatter(y, b, d, k)      becomes   cat([a, b], d)

Only where the slices lie side by side and leave nothing of the fresh tensor, and their sizes are numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .edit import replace
from .nodes import value
from .program import Program

aten = torch.ops.aten
_FRESH = {
    aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.empty.memory_format,
    aten.zeros.default, aten.ones.default, aten.full.default, aten.empty_like.default, aten.zeros_like.default,
}  # fmt: skip


def join_slices(program: Program) -> None:
    """Put such tensors together in place; what is left over is dead code."""
    for node in program.nodes(aten.slice_scatter.default):
        parts = _parts(node)
        if parts is None:
            continue
        dim, pieces = parts
        joined = program.insert(node, aten.cat.default, pieces, dim)
        if value(joined).dtype == value(node).dtype and value(joined).shape == value(node).shape:
            replace(node, joined)


def _parts(last: fx.Node) -> tuple[int, list[fx.Node]] | None:
    """The dimension and the pieces, in order, that fill a fresh tensor up to this write; None where they do not."""
    dim, found = _span(last)[0], {}
    node: Any = last
    while node.target is aten.slice_scatter.default:
        at, start, end = _span(node)
        piece = _written(node.args[1])
        if at != dim or start is None or end is None or piece is None or start in found:
            return None
        found[start] = (end, piece)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in _FRESH:
        return None
    place, pieces = 0, []
    while place in found:
        place, piece = found.pop(place)
        pieces.append(piece)
    whole = not found and place == value(last).shape[dim]
    same = len({value(p).dtype for p in pieces} | {value(last).dtype}) == 1
    return (dim, pieces) if whole and same and len(pieces) > 1 else None


def _span(node: fx.Node) -> tuple[int, int | None, int | None]:
    """Dimension, first and last place of a write; None for places that are no numbers, or steps."""
    given: list[Any] = [*node.args[2:], *[None] * 4]
    dim: Any = given[0] if given[0] is not None else node.kwargs.get("dim", 0)
    known = value(node)
    dim, size = int(dim) % known.dim(), known.shape[int(dim) % known.dim()]
    start, end = given[1] or 0, size if given[2] is None else given[2]
    if given[3] not in (None, 1) or node.kwargs or not all(isinstance(n, int) for n in (start, end, size)):
        return dim, None, None
    start, end = (n + size if n < 0 else min(n, size) for n in (start, end))
    return dim, start, end


def _written(piece: Any) -> fx.Node | None:
    """What a write puts there; None where that is cast or repeated on the way, which reads the place it goes to."""
    if not isinstance(piece, fx.Node) or piece.target is not aten.copy.default:
        return piece if isinstance(piece, fx.Node) else None
    source = piece.args[1]
    same = isinstance(source, fx.Node) and value(source).dtype == value(piece).dtype
    return source if same and value(source).shape == value(piece).shape else None  # type: ignore[return-value]
