"""Reads what an attention mask shows from its expression.

transformers writes a mask as conditions joined by "and", over position vectors laid out [.., S, 1] for
queries and [.., 1, S] for keys, and a padding mask. Each condition is recognised by itself. Nothing is
evaluated: a window wider than the captured sequence is found too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.packed_layout import Visibility
from thresher.graph.sizes import same_size

from .pattern import CASTS, Number, Var, call, either, match

aten = torch.ops.aten

_AND = {aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor}
_SAME = CASTS | {aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.slice.Tensor}
_WHERE = {aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf}
_TRUE = {aten.ones.default, aten.new_ones.default, aten.ones_like.default}

_query = Var("query", lambda n: _lies(n, -2), "a vector of query positions")
_key = Var("key", lambda n: _lies(n, -1), "a vector of key positions")
_int = (torch.int64, torch.int32)

_CAUSAL = either(call(aten.le.Tensor)(_key, _query), call(aten.ge.Tensor)(_query, _key))
BEFORE = either(
    call(aten.gt.Tensor)(_key, call(aten.sub.Tensor)(_query, Number("width"))),
    call(aten.lt.Tensor)(call(aten.sub.Tensor)(_query, Number("width")), _key),
)
NEAR = call(aten.le.Scalar)(
    call(aten.abs.default)(either(call(aten.sub.Tensor)(_query, _key), call(aten.sub.Tensor)(_key, _query))),
    Number("reach"),
)
_ANY_ROW = call(aten.ge.Scalar)(Var("position", lambda n: _lies(n, -2) or _lies(n, -1), "positions"), 0)


def _lies(node: fx.Node, dim: int) -> bool:
    """Whether a node is an integer vector along one of the last two dimensions, the other being 1."""
    known = value(node)
    if not isinstance(known, torch.Tensor) or known.dtype not in _int or known.dim() < 2:
        return False
    return same_size(known.shape[-3 - dim], 1)


def read_masks(masks: Sequence[fx.Node], is_causal: bool) -> Visibility:
    """What queries see through all of these masks together."""
    causal, back, around = is_causal, -1, -1
    for mask in masks:
        for condition in conditions(mask):
            if match(_CAUSAL, condition):
                causal = True
            elif found := match(BEFORE, condition):
                back = found["width"] - 1
            elif found := match(NEAR, condition):
                around = found["reach"]
            elif condition.target in _TRUE or match(_ANY_ROW, condition) or _is_padding(condition):
                continue
            else:
                return Visibility("generic")
    if causal:
        return Visibility("causal", max(back, around) if -1 in (back, around) else min(back, around))
    return Visibility("generic") if back >= 0 else Visibility("bidirectional", around)


def conditions(mask: Any) -> Iterator[fx.Node]:
    """The conditions that a mask joins by "and", one by one, behind casts and changes of shape."""
    while True:
        if (mask.target in _SAME and mask.args[0].op != "placeholder") or _hides(mask):
            mask = mask.args[0]
        elif mask.target in _AND and value(mask).dtype is torch.bool:
            yield from conditions(mask.args[0])
            mask = mask.args[1]
        else:
            yield mask
            return


def _hides(node: fx.Node) -> bool:
    """Whether `where` gives 0 for true and a large negative number for false."""
    if node.target not in _WHERE:
        return False
    shown: Any = node.args[1]
    hidden: Any = node.args[2]
    if isinstance(hidden, fx.Node):
        hidden = hidden.args[1] if hidden.target is aten.full.default else None
    if isinstance(shown, fx.Node):
        zeros = shown.target in (aten.zeros.default, aten.zeros_like.default)
        shown = 0 if zeros else shown.args[1] if shown.target is aten.full.default else None
    return shown == 0 and isinstance(hidden, (int, float)) and hidden < -1e4


def _is_padding(node: fx.Node) -> bool:
    """A condition on keys only that comes from the caller's values: the same for every query and head."""
    known = value(node)
    if known.dtype is not torch.bool or (known.dim() > 2 and not same_size(known.shape[-2], 1)):
        return False
    stack, seen = [node], set()
    while stack:
        one = stack.pop()
        if one.op == "placeholder" and isinstance(value(one), torch.Tensor):
            return True
        if one not in seen and one.target is not aten.sym_size.int:  # sizes are not values
            seen.add(one)
            stack += one.all_input_nodes
    return False
