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

from .errors import DialectError
from .program import Program, value

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
_SIZE_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.truediv,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem,
    torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite, torch.sym_sum,
}  # fmt: skip


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(same_size(x, y) for x, y in zip(a.shape, b.shape))


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
        elif node.target is aten.type_as.default and value(node).device == value(node.args[0]).device:
            node.target, node.args = aten.to.dtype, (node.args[0], value(node).dtype)
        elif node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.kwargs["dtype"]), {}


def _write_to_copies(graph: fx.Graph) -> None:
    """`scores += bias` becomes `scores = scores + bias` where nothing else sees the written memory.

    A write to an input, to a weight, or to memory that another value shares stays, and `verify` names it.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
        pure = getattr(getattr(aten, packet[:-1], None), overload, None) if packet.endswith("_") else None
        written = node.args[0] if node.args else None
        if (
            pure is None
            or _mutates(pure)
            or not isinstance(written, fx.Node)
            or written.op != "call_function"
        ):
            continue
        before = [u for u in written.users if position[u] < position[node]]
        if _shares_memory(written) or any(_shares_memory(u) and u.users for u in before):
            continue
        if value(written).dtype != value(node).dtype or not same_shape(value(written), value(node)):
            continue
        node.target = pure

        def later(user: fx.Node, at: int = position[node]) -> bool:
            return position[user] > at

        written.replace_all_uses_with(node, delete_user_cb=later)


def _shares_memory(node: fx.Node) -> bool:
    """Whether a node's result may lie in one of its arguments' memory."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _shares_memory(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    may_alias = node.target in _RESHAPES or node.target in _ALIASES or node.target in _CASTS
    return may_alias or any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))


def canonicalise(program: Program) -> Program:
    """Bring a freshly traced Program into the dialect, in place; returns it."""
    graph = program.graph
    _drop_meaningless(graph)
    _write_to_copies(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and (source := _identity_of(node)) is not None:
            node.replace_all_uses_with(source)
    _settle_spelling(graph)
    program.clean()
    return program


def _mutates(target: torch._ops.OpOverload) -> bool:
    return target._schema.is_mutable


_RULES: list[tuple[str, Callable[[Program, fx.Node], bool]]] = [
    ("only placeholder, get_attr, call_function and output nodes are allowed",
     lambda p, n: n.op in ("placeholder", "get_attr", "call_function", "output")),
    ("every get_attr names a weight of the Program",
     lambda p, n: n.op != "get_attr" or str(n.target) in p.weights),
    ("a called function is an ATen or thresher operator overload, or arithmetic on sizes",
     lambda p, n: n.op != "call_function" or isinstance(n.target, torch._ops.OpOverload) or n.target in _SIZE_FUNCTIONS),
    ("operators are functional: none may write to its arguments",
     lambda p, n: not isinstance(n.target, torch._ops.OpOverload) or not _mutates(n.target)),
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
