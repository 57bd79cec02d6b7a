"""Finds rotary position embeddings: `x * cos + rotate(x) * sin`, on a whole head or its first part."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value

from .pattern import Anything, Bindings, Var, call, either, is_cast, match, uncast
from .sites import Rope

aten = torch.ops.aten

_MAX = 2**62
_LAYOUT = {
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.transpose.int,
    aten.repeat_interleave.self_int,
}  # fmt: skip
_x, _cos, _sin = Var("x"), Var("cos"), Var("sin")
_neg, _cat, _add, _mul = (
    call(aten.neg.default),
    call(aten.cat.default),
    call(aten.add.Tensor),
    call(aten.mul.Tensor),
)
_first, _second = Var("first"), Var("second")

_rotate_half = _cat([_neg(_second), _first], -1)
_rotate_pairs = either(
    call(aten.flatten.using_ints)(call(aten.stack.default)([_neg(_second), _first], -1), -2),
    call(aten.reshape.default)(call(aten.stack.default)([_neg(_second), _first], -1), Anything()),
)
_HALF = _add(_mul(_x, _cos), _mul(_rotate_half, _sin))
_PAIRS = _add(_mul(_x, _cos), _mul(_rotate_pairs, _sin))
_PARTIAL = _cat([Var("rotated"), Var("rest")], -1)
_sub = call(aten.sub.Tensor)
_SPLIT = _cat(
    [_sub(_mul(_first, _cos), _mul(_second, _sin)), _add(_mul(_second, _cos), _mul(_first, _sin))], -1
)
_complex = call(aten.view_as_complex.default)(call(aten.reshape.default)(_x, Anything()))
_turned = call(aten.view_as_real.default)(_mul(_complex, _cos))
_COMPLEX = either(call(aten.flatten.using_ints)(_turned, 3), call(aten.reshape.default)(_turned, Anything()))


def find_rope(node: fx.Node) -> tuple[Rope, fx.Node] | None:
    """The rotation whose result is `node`, and what it rotates; None when there is none."""
    node = uncast(node)
    if node.target is aten.cat.default:
        return _partial(node) or _split(node)
    if node.target in (aten.flatten.using_ints, aten.reshape.default):
        return _complex_product(node)
    if node.target is not aten.add.Tensor:
        return None
    for kind, pattern in (("half", _HALF), ("interleaved", _PAIRS)):
        found = match(pattern, node)
        if isinstance(found, Bindings) and _rotates(found, kind):
            rope = Rope(kind, _table(found["cos"]), _table(found["sin"]), _width(node))
            return rope, found["x"]
    return None


def _partial(node: fx.Node) -> tuple[Rope, fx.Node] | None:
    """`cat(rope(x[..., :r]), x[..., r:])`; the rest may be empty."""
    found = match(_PARTIAL, node)
    if not found:
        return None
    inner = find_rope(found["rotated"])  # type: ignore[index]
    rest: fx.Node = found["rest"]  # type: ignore[index]
    if inner is None or rest.target is not aten.slice.Tensor:
        return None
    rope, rotated = inner
    whole: fx.Node = rest.args[0]  # type: ignore[assignment]
    if _range(rest) != (rope.dim, _width(whole), 1):
        return None
    if rotated is whole and _width(rest) == 0:
        return rope, whole
    begins = (
        rotated.target is aten.slice.Tensor
        and rotated.args[0] is whole
        and _range(rotated) == (0, rope.dim, 1)
    )
    return (rope, whole) if begins else None


def _split(node: fx.Node) -> tuple[Rope, fx.Node] | None:
    """Pairs in, halves out: `cat(x0 cos - x1 sin, x1 cos + x0 sin)` with x0 and x1 every second element."""
    found = match(_SPLIT, node)
    if not found or any(found[p].target is not aten.slice.Tensor for p in ("first", "second")):  # type: ignore[index]
        return None
    x = found["first"].args[0]  # type: ignore[index]
    whole = Bindings({**found.values, "x": x}, found.nodes)  # type: ignore[union-attr]
    if not _rotates(whole, "split") or _width(x) != _width(node):
        return None
    return Rope("split", _table(whole["cos"]), _table(whole["sin"]), _width(node)), x


def _complex_product(node: fx.Node) -> tuple[Rope, fx.Node] | None:
    """Pairs as complex numbers, multiplied by those of unit length."""
    found = match(_COMPLEX, node)
    if not found or list(value(found["x"]).shape) != list(value(node).shape):  # type: ignore[index]
        return None
    table = _table(found["cos"])  # type: ignore[index]
    return Rope("complex", table, table, _width(node)), found["x"]  # type: ignore[index]


def _rotates(found: Bindings, kind: str) -> bool:
    """Whether the two parts are x's halves, or its even and odd elements."""
    x, first, second = found["x"], found["first"], found["second"]
    width = _width(x)
    if any(
        part.target is not aten.slice.Tensor or uncast(part.args[0]) is not uncast(x)
        for part in (first, second)
    ):
        return False
    expected = (
        ((0, width // 2, 1), (width // 2, width, 1)) if kind == "half" else ((0, width, 2), (1, width, 2))
    )
    return (_range(first), _range(second)) == expected


def _range(part: fx.Node) -> tuple[int, int, int]:
    """Start, end and step of a slice along the last dimension; an impossible range when along another."""
    given: list[Any] = [*part.args[1:], *(0, None, _MAX, 1)[len(part.args) - 1 :]]
    dim, start, end, step = given
    width = _width(part.args[0])
    if dim not in (-1, value(part).dim() - 1) or any(isinstance(i, fx.Node) for i in given):
        return (-1, -1, -1)
    start, end = start or 0, width if end is None else min(end, width)
    return start + width if start < 0 else start, end + width if end < 0 else end, step


def _is_first_half(node: fx.Node) -> bool:
    """Whether a node is the first half of a table's last dimension."""
    if node.target is not aten.slice.Tensor:
        return False
    return _range(node) == (0, _width(node.args[0]) // 2, 1)


def _width(node: Any) -> int:
    return value(node).shape[-1]


def _table(node: fx.Node) -> fx.Node:
    """Cosines or sines as computed, before they are laid out for the heads, or halved where both halves are alike."""
    while is_cast(node) or node.target in _LAYOUT or _is_first_half(node):
        node = node.args[0]  # type: ignore[assignment]
    return node
