"""Replaces operators of ours by plain ATen in a Program, for targets that know only that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from thresher import ops, plain_form
from thresher.errors import ThresherError
from thresher.graph.edit import replace
from thresher.graph.nodes import argument, fake_like, value
from thresher.graph.program import Program, Weight
from thresher.graph.tracing import trace
from thresher.kernels.varlen.plain import as_mask
from thresher.plain_form import Plain


def own_nodes(program: Program) -> list[fx.Node]:
    """The nodes that call operators of the `thresher::` namespace, in order."""
    return [
        n
        for n in program.nodes()
        if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == ops.NAMESPACE
    ]


def op_name(node: fx.Node) -> str:
    """The name of a node's operator without its namespace and overload: `linear` for `aten.linear.default`."""
    return str(node.target).split(".")[1]


def inline(program: Program, node: fx.Node, function: Callable[..., Any], *more: fx.Node) -> fx.Node:
    """Replace a node by what `function` does with its arguments (and with `more` nodes), in place.

    Returns the node that gives the result; for several results, the first one's.
    """
    made = trace_before(program, node, function, [*node.args, *more], dict(node.kwargs))
    return replace(node, made, erase=True)


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
        traced = trace(run, [value(flat[i]) for i in places])
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


class Spelling:
    """A program whose operators are being replaced by their plain forms (`plain_form.Spelling`)."""

    def __init__(self, program: Program, added_masks: bool, columns: fx.Node | None):
        self.program, self.added_masks, self.columns = program, added_masks, columns
        self._made: dict[Hashable, Any] = {}
        self._constants: dict[str, str] = {}

    def traced(self, node: fx.Node, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Insert what `function` does with graph arguments before a node; the node or nodes of its result."""
        return trace_before(self.program, node, function, list(arguments))

    def once(
        self, key: Hashable, node: fx.Node, function: Callable[..., Any], arguments: Sequence[Any]
    ) -> Any:
        """The same for what several calls share: inserted before the first that asks for `key`."""
        if key not in self._made:
            self._made[key] = self.traced(node, function, arguments)
        return self._made[key]

    def constant(self, name: str, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
        """A tensor as a weight of the program, stored once under a name; the node that reads it, before `node`."""
        if name not in self._constants:
            made = self.program.get_weight(Weight(name, tensor), node)
            self._constants[name] = str(made.target)
        else:
            with self.program.graph.inserting_before(node):
                made = self.program.graph.create_node("get_attr", self._constants[name])
            made.meta["val"] = fake_like(tensor, node)
        return made


def columns_wanted(program: Program) -> Any:
    """The number of packed tokens, where some operator's plain form counts in the padded batch's columns; else None."""
    for node in own_nodes(program):
        op = ops.of(node.target)
        if op is not None and isinstance(op.plain, Plain) and op.plain.columns is not None:
            tokens = op.plain.columns(node)
            if tokens is not None:
                return tokens
    return None


def losses(program: Program) -> list[tuple[int, str, str]]:
    """What plain forms lose in a program: how many nodes, their operator's name, and a sentence."""
    found: Counter[tuple[str, str]] = Counter()
    for node in own_nodes(program):
        op = ops.of(node.target)
        if op is not None and isinstance(op.plain, Plain) and op.plain.loss:
            found[op.name, op.plain.loss] += 1
    return [(count, *which) for which, count in found.items()]


def decompose(program: Program, *, added_masks: bool = False, columns: fx.Node | None = None) -> None:
    """Replace every operator of ours in a program by its plain form, in place.

    added_masks, columns: see `plain_form.Spelling`. Raises ThresherError for an operator without a plain form.
    """
    spelling = Spelling(program, added_masks, columns)
    for node in own_nodes(program):
        op = ops.of(node.target)
        plain = op.plain if op is not None else plain_form.NONE
        if op is None or isinstance(plain, str):
            raise ThresherError(
                f"{node.target} ({node.name}) has no form in plain ATen for this target. {plain}"
            )
        if plain.spell is None:
            inline(program, node, plain.run or op.reference)
            continue
        replace(node, plain.spell(spelling, node), erase=True)
    drop_unread_sizes(program)
    program.clean()


def add_masks(program: Program) -> None:
    """Turn bool attention masks into ones added to the scores, in place. TensorRT fuses attention under an
    added mask into one kernel, and computes it in ten under a bool one."""
    made: dict[Any, fx.Node] = {}
    for node in program.nodes(torch.ops.aten.scaled_dot_product_attention.default):
        mask = argument(node, "attn_mask")
        if not isinstance(mask, fx.Node) or value(mask).dtype != torch.bool:
            continue
        dtype = value(node.args[0]).dtype
        if (mask, dtype) not in made:
            made[mask, dtype] = trace_before(program, node, as_mask, [mask, dtype])
        node.replace_input_with(mask, made[mask, dtype])


def numbers_read(program: Program) -> list[fx.Node]:
    """The inputs that are numbers and no tensors, and that something else than an operator of ours reads."""
    own = set(own_nodes(program))
    return [
        place
        for place in program.placeholders
        if not isinstance(value(place), torch.Tensor) and any(user not in own for user in place.users)
    ]


def number_read(place: fx.Node) -> str:
    """The sentence for a target that takes tensors alone."""
    return (
        f"The input {place.name} is a number, which the graph reads, and the target takes tensors alone. "
        "Capture the model by torch.export, which reads sizes from tensors."
    )


def drop_unread_sizes(program: Program) -> None:
    """Remove size placeholders that nothing reads any more, such as `max_len`."""
    kept = []
    for place, name in zip(program.placeholders, program.input_names, strict=True):
        if place.users or isinstance(value(place), torch.Tensor):
            kept.append(name)
        else:
            program.graph.erase_node(place)
    program.input_names = kept
