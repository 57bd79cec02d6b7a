"""The dialect: functional, pre-dispatch ATen, in one spelling.

`canonicalise` removes what carries no meaning (metadata asserts, no-op casts and slices, inactive
dropout, detach, aliases) and settles on one name where ATen has several (`view` and its like are
`reshape`). `verify` says whether a graph is in the dialect, naming the node and the rule it breaks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import DialectError
from .edit import replace
from .nodes import value, writes
from .program import Program
from .routed import unroute
from .scatters import join_slices
from .sizes import same_shape, same_size

aten = torch.ops.aten

_MAX = 2**62  # slices written as [:] end near the largest int64

# Results equal their first argument, whatever the other arguments are.
_ALIASES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.type_as.default,
}
# Layout only; kept where the caller receives the result, dropped inside the graph.
_LAYOUT = {aten.contiguous.default, aten.clone.default}
_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
_DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default}
_NO_MEANING = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_check",
}
_JOINS = {aten.concat.default, aten.concatenate.default}
_SIZE_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.truediv,
    operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem,
    torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite, torch.sym_sum,
}  # fmt: skip


def unrepeated(node: fx.Node) -> fx.Node | None:
    """Keys or values [batch, heads, tokens, dim] before each head is repeated for its query heads, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or value(node).dim() != 4:
        return None
    if node.target is aten.repeat_interleave.self_int:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return source if dim in (1, -3) else None
    if node.target is not aten.reshape.default or source.target is not aten.expand.default:
        return None
    lifted: Any = source.args[0]
    if (
        lifted.target is not aten.unsqueeze.default
        or lifted.args[1] not in (2, -3)
        or value(lifted).dim() != 5
    ):
        return None
    _, kv_heads, times, *rest = value(source).shape
    flat = value(node).shape
    kept = all(same_size(a, b) for a, b in zip(flat[2:], rest))
    return lifted.args[0] if kept and same_size(flat[1], kv_heads * times) else None


def unrepeated_both(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their heads are repeated, where both are: an operator shares the heads of both, or of none."""
    sources = unrepeated(k), unrepeated(v)
    return (k, v) if sources[0] is None or sources[1] is None else (sources[0], sources[1])


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The argument a node merely repeats, or None."""
    target, result = node.target, value(node)
    first = node.args[0] if node.args else None
    if target is aten.cat.default and isinstance(first, (list, tuple)):
        # transformers starts its caches from torch.tensor([]) and concatenates onto it
        kept = [n for n in first if not (isinstance(value(n), torch.Tensor) and value(n).shape == (0,))]
        return kept[0] if len(kept) == 1 else None
    if not isinstance(first, fx.Node) or not isinstance(value(first), torch.Tensor):
        return None
    source = value(first)
    if target in _CASTS:
        same = (
            isinstance(result, torch.Tensor)
            and result.dtype == source.dtype
            and result.device == source.device
        )
        return first if same else None
    if target in _LAYOUT and any(user.op == "output" for user in node.users):
        return None
    if target in _ALIASES:
        return first
    if target in _DROPOUT and (node.args[1] == 0 or node.args[2] is False):
        return first
    if target is aten.slice.Tensor and node.args[2:3] in ((0,), (None,), ()):
        step = node.args[4] if len(node.args) > 4 else 1
        end = node.args[3] if len(node.args) > 3 else None
        whole = end is None or (isinstance(end, int) and end >= _MAX)
        return first if step == 1 and (whole or same_shape(result, source)) else None
    if target in _RESHAPES or target in (aten.expand.default, aten.view_as.default):
        return first if same_shape(result, source) else None
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor) and node.args[1] == 1:
        return first if result.dtype == source.dtype else None
    return None


def _drop_meaningless(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        if node.op == "call_function" and name in _NO_MEANING and not node.users:
            graph.erase_node(node)


def _settle_spelling(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _RESHAPES:
            node.target = aten.reshape.default
        elif node.target in _JOINS:
            node.target = aten.cat.default
        elif node.target is aten.type_as.default and value(node).device == value(node.args[0]).device:
            node.target, node.args = aten.to.dtype, (node.args[0], value(node).dtype)
        elif node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.kwargs["dtype"]), {}


def canonicalise(program: Program) -> Program:
    """Bring a freshly traced Program into the dialect, in place; returns it."""
    graph = program.graph
    _drop_meaningless(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and (source := _identity_of(node)) is not None:
            replace(node, source, erase=True)
    _settle_spelling(graph)
    join_slices(program)
    unroute(program)
    program.clean()
    return program


_RULES: list[tuple[str, Callable[[Program, fx.Node], bool]]] = [
    ("only placeholder, get_attr, call_function and output nodes are allowed",
     lambda p, n: n.op in ("placeholder", "get_attr", "call_function", "output")),
    ("every get_attr names a weight of the Program",
     lambda p, n: n.op != "get_attr" or str(n.target) in p.weights),
    ("a called function is an ATen or thresher operator overload, or arithmetic on sizes",
     lambda p, n: n.op != "call_function" or isinstance(n.target, torch._ops.OpOverload) or n.target in _SIZE_FUNCTIONS),
    ("operators are functional: none may write to its arguments",
     lambda p, n: not writes(n)),
    ("every value carries its fake tensor or size in meta['val']",
     lambda p, n: n.op == "output" or "val" in n.meta),
]  # fmt: skip


def violations(program: Program) -> list[str]:
    """Each rule broken and where, as sentences."""
    found = []
    for node in program.graph.nodes:
        for rule, holds in _RULES:
            if not holds(program, node):
                found.append(f"{node.format_node()}: {rule}.")
    return found


def verify(program: Program, after: str = "capture") -> None:
    """Raise DialectError, naming node and rule, when the Program is not in the dialect."""
    program.graph.lint()
    found = violations(program)
    if found:
        raise DialectError(f"After {after} the graph is not in the dialect: {found[0]} ({len(found)} in all)")
