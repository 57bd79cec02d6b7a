"""The dialect: functional, pre-dispatch ATen, in one spelling.

`canonicalise` removes what carries no meaning (metadata asserts, no-op casts and slices, inactive
dropout, detach, aliases) and settles on one name where ATen has several (`view` and its like are
`reshape`). `verify` says whether a graph is in the dialect, naming the node and the rule it breaks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import DialectError
from .nodes import value, writes
from .program import Program

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
# And the result lies where that argument does, where dtype and device stay or all of it is sliced.
_THE_SAME = {
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.slice.Tensor,
}
_COPIES = {aten.clone.default, aten.lift_fresh_copy.default}  # equal, and never in the argument's memory
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
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if isinstance(a, int) and isinstance(b, int):
        return a == b
    with disable_proxy_modes_tracing():  # while a piece is traced, the question is no part of it
        return statically_known_true(a == b)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(same_size(x, y) for x, y in zip(a.shape, b.shape))


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


def _write_to_copies(program: Program) -> None:
    """`scores += bias` becomes `scores = scores + bias` where nothing else sees the written memory.

    A write to an input becomes one more result, its new value (`Program.updates`). A write to a weight, to memory that
    another value still shows afterwards, or to an input that is handed back as well, stays, and `verify` names it.
    """
    graph = program.graph
    position = {node: i for i, node in enumerate(graph.nodes)}
    inputs = {p: i for i, p in enumerate(program.placeholders) if not _handed_back(p)}
    written: dict[int, fx.Node] = {}  # input -> its value so far
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
        pure = getattr(getattr(aten, packet[:-1], None), overload, None) if packet.endswith("_") else None
        place = _written(node.args[0] if node.args else None)
        if (
            pure is None
            or pure._schema.is_mutable
            or not isinstance(place, fx.Node)
            or place.op == "get_attr"
        ):
            continue
        number = inputs.get(place, next((i for i, n in written.items() if n is place), None))
        if number is None and _shares_memory(place):
            continue
        before = [u for u in place.users if position[u] < position[node] and _shares_memory(u)]
        if any(position[u] > position[node] for n in _sharing(before, but=node) for u in n.users):
            continue
        if value(place).dtype != value(node).dtype or not same_shape(value(place), value(node)):
            continue
        node.target = pure
        at = position[node]
        place.replace_all_uses_with(node, delete_user_cb=lambda user, at=at: position[user] > at)  # type: ignore[misc]
        if number is not None:
            written[number] = node
    results = program.outputs
    program.updates = {len(results) + i: number for i, number in enumerate(written)}
    program.output_node.args = ((*results, *written.values()),)


def _written(place: object) -> object:
    """The value behind casts, aliases and slices that change nothing: they lie in its memory, element for element."""
    while (
        isinstance(place, fx.Node)
        and place.target in _THE_SAME
        and not any(given is True for given in (*place.args, *place.kwargs.values()))
    ):
        source = _identity_of(place)
        if source is None:
            break
        place = source
    return place


def _handed_back(place: fx.Node) -> bool:
    """Whether a result lies in an input's memory: its caller means the input, not a copy of it."""
    return any(u.op == "output" for n in _sharing([place]) for u in n.users)


def _sharing(nodes: Sequence[fx.Node], but: fx.Node | None = None) -> set[fx.Node]:
    """These nodes, and all whose results may lie in their memory, but for those that have it from `but`."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [u for u in node.users if u.op == "call_function" and u is not but and _shares_memory(u)]
    return found


def _shares_memory(node: fx.Node) -> bool:
    """Whether a node's result may lie in one of its arguments' memory."""
    if node.target in _COPIES:
        return False
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
    _write_to_copies(program)
    for node in list(graph.nodes):
        if node.op == "call_function" and (source := _identity_of(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _settle_spelling(graph)
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
