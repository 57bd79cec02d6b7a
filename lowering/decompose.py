"""Replaces operators of ours by plain ATen in a Program, for targets that know only that."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from thresher.errors import ThresherError
from thresher.graph.nodes import fake_like, value
from thresher.graph.program import Program, Weight
from thresher.kernels.varlen.attention import varlen_attention_masked
from thresher.ops import NAMESPACE

from . import plain_ops

ops = torch.ops.thresher


def own_nodes(program: Program) -> list[fx.Node]:
    """The nodes that call operators of the `thresher::` namespace, in order."""
    return [
        n
        for n in program.nodes()
        if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == NAMESPACE
    ]


def op_name(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def inline(program: Program, node: fx.Node, function: Callable[..., Any], *more: fx.Node) -> fx.Node:
    """Replace a node by what `function` does with its arguments (and with `more` nodes), in place.

    Returns the node that gives the result; for several results, the first one's.
    """
    made = trace_before(program, node, function, [*node.args, *more], dict(node.kwargs))
    if not isinstance(made, tuple):
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)
        return made
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise ThresherError(f"{node.name} gives several results, and {user.name} takes them all at once.")
        user.replace_all_uses_with(made[user.args[1]])  # type: ignore[index]
        program.graph.erase_node(user)
    program.graph.erase_node(node)
    return made[0]


def trace_before(
    program: Program,
    node: fx.Node,
    function: Callable[..., Any],
    args: list[Any],
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Insert what `function(*args, **kwargs)` computes before a node; returns the node or nodes of its result.

    args: graph arguments, that is nodes, constants, or lists of them.
    """
    mode = program.fake_mode()
    if mode is None:
        raise ThresherError("The program has no fake tensors, so nothing can be traced into it.")
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs or {}))
    places = [i for i, a in enumerate(flat) if isinstance(a, fx.Node)]

    def run(*given: Any) -> Any:
        filled = list(flat)
        for place, tensor in zip(places, given):
            filled[place] = tensor
        positional, named = torch.utils._pytree.tree_unflatten(filled, spec)
        result = function(*positional, **named)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    with mode, torch.no_grad():
        traced = make_fx(run, pre_dispatch=True)(*[value(flat[i]) for i in places])
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = iter(flat[i] for i in places)
    results: tuple[Any, ...] = ()
    with program.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(inputs)
            elif inner.op == "get_attr":
                tensor = getattr(traced, str(inner.target))
                mapping[inner] = program.get_weight(
                    Weight(f"constant.{node.name}.{inner.name}", tensor), node
                )
            elif inner.op == "output":
                results = tuple(mapping[a] for a in inner.args[0])
            elif inner.op == "call_function":
                copied = program.graph.node_copy(inner, lambda n: mapping[n])
                copied.meta = {**inner.meta, "nn_module_stack": node.meta.get("nn_module_stack", {})}
                mapping[inner] = copied
            else:
                raise ThresherError(f"Tracing {node.name} gave an unexpected {inner.op} node.")
    return results if len(results) > 1 else results[0]


class Masks:
    """The masks of packed attention, each built once for all layers that use it.

    dtype: None for bool masks, or the dtype in which they are added to the scores.
    columns: the tokens' columns [T], which a sliding window counts in; None to count packed positions.
    """

    def __init__(self, program: Program, additive: bool, columns: fx.Node | None):
        self.program, self.additive, self.columns = program, additive, columns
        self._segments: dict[fx.Node, fx.Node] = {}
        self._made: dict[tuple[Any, ...], fx.Node] = {}

    def attend(self, node: fx.Node) -> None:
        """Replace one `varlen_attention` or `varlen_attention_masked` node."""
        q, k, v = node.args[:3]
        key: tuple[Any, ...]
        dtype = value(q).dtype if self.additive else None
        if node.target is varlen_attention_masked.overload:
            mask, rows, cols, cu_seqlens, _, scale = node.args[3:]
            key = (mask, rows, cols, cu_seqlens, dtype)
            if key not in self._made:
                self._made[key] = trace_before(
                    self.program, node, plain_ops.masked, [mask, rows, cols, cu_seqlens, dtype]
                )
            options: list[Any] = [scale, 0.0, True]
        else:
            cu_seqlens, _, scale, causal, window, softcap = node.args[3:]
            key = (cu_seqlens, causal, window, dtype)
            if key not in self._made:
                self._made[key] = self._visible(node, q, cu_seqlens, causal, window, dtype)
            options = [scale, softcap, False]
        mask_node = self._made[key]
        result = trace_before(self.program, node, plain_ops.attend_packed, [q, k, v, mask_node, *options])
        node.replace_all_uses_with(result)
        self.program.graph.erase_node(node)

    def _visible(
        self, node: fx.Node, q: Any, cu_seqlens: Any, causal: Any, window: Any, dtype: Any
    ) -> fx.Node:
        if cu_seqlens not in self._segments:
            self._segments[cu_seqlens] = trace_before(
                self.program, node, lambda c, t: plain_ops.segments(c, t.shape[2]), [cu_seqlens, q]
            )
        segment = self._segments[cu_seqlens]

        def visible(s: Any, columns: Any) -> Any:
            place = torch.arange(s.shape[0], device=s.device) if columns is None else columns
            return plain_ops.visible(s, place, causal, window, dtype)

        columns = self.columns if window >= 0 else None
        return trace_before(self.program, node, visible, [segment, columns])


def windowed(program: Program) -> bool:
    """Whether some packed attention counts distances, for which padded columns matter where rows have holes."""
    return any(n.args[7] >= 0 for n in program.nodes(ops.varlen_attention.default))  # type: ignore[operator]


def decompose(
    program: Program, *, additive: bool = False, columns: fx.Node | None = None, keep: tuple[str, ...] = ()
) -> None:
    """Replace every operator of ours in a program, in place, but for those named in `keep`.

    Raises ThresherError for an operator without a plain form.
    """
    masks = Masks(program, additive, columns)
    matrices: dict[Any, str] = {}
    for node in own_nodes(program):
        name = op_name(node)
        if name in keep:
            continue
        if name in ("varlen_attention", "varlen_attention_masked"):
            masks.attend(node)
            continue
        if name == "hadamard":
            _rotate(program, node, matrices)
            continue
        if name == "probe_positions":
            _probe(program, node)
            continue
        function = plain_ops.plain(name)
        if function is None:
            raise ThresherError(f"thresher::{name} ({node.name}) has no form in plain ATen for this target.")
        inline(program, node, function)
    drop_unread_sizes(program)
    program.clean()


def add_masks(program: Program) -> None:
    """Turn bool attention masks into ones added to the scores, in place. TensorRT fuses attention under an
    added mask into one kernel, and computes it in ten under a bool one."""
    made: dict[Any, fx.Node] = {}
    for node in program.nodes(torch.ops.aten.scaled_dot_product_attention.default):
        position = 3 if len(node.args) > 3 else None
        mask = node.args[3] if position else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node) or value(mask).dtype != torch.bool:
            continue
        dtype = value(node.args[0]).dtype
        if (mask, dtype) not in made:
            made[mask, dtype] = trace_before(program, node, plain_ops.as_mask, [mask, dtype])
        node.replace_input_with(mask, made[mask, dtype])


def _rotate(program: Program, node: fx.Node, matrices: dict[Any, str]) -> None:
    """A Hadamard transform as products with its factors, which all transforms of that order share."""
    x, signs, block = node.args
    wide = torch.promote_types(value(x).dtype, torch.float32)
    held = []
    for number, factor in enumerate(plain_ops.factors(block, wide)):  # type: ignore[arg-type]
        key = (block, wide, number)
        if key not in matrices:
            made = program.get_weight(Weight(f"hadamard.{block}.{number}", factor), node)
            matrices[key] = str(made.target)
        else:
            with program.graph.inserting_before(node):
                made = program.graph.create_node("get_attr", matrices[key])
            made.meta["val"] = fake_like(factor, node)
        held.append(made)
    result = trace_before(program, node, plain_ops.rotate, [x, signs, *held])
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)


def _probe(program: Program, node: fx.Node) -> None:
    """Probe positions with their random draw, which depends on the seed alone, as a constant."""
    starts, lengths, recent, spread, seed = node.args
    drawn = program.get_weight(Weight(f"{node.name}.draw", plain_ops.draw(spread, seed)), node)  # type: ignore[arg-type]
    node.replace_all_uses_with(
        trace_before(program, node, plain_ops.positions, [starts, lengths, recent, drawn])
    )
    program.graph.erase_node(node)


def drop_unread_sizes(program: Program) -> None:
    """Remove size placeholders that nothing reads any more, such as `max_len`."""
    kept = []
    for place, name in zip(program.placeholders, program.input_names, strict=True):
        if place.users or isinstance(value(place), torch.Tensor):
            kept.append(name)
        else:
            program.graph.erase_node(place)
    program.input_names = kept
