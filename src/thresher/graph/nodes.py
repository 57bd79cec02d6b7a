"""Questions about one node of a graph: its value, its shape, the module it came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import names


def writes(node: fx.Node) -> bool:
    """Whether a call writes to its arguments: not in the dialect, and no dead code either."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def value(node: object) -> Any:
    """What a graph argument stands for: a node's fake tensor or size, or the constant itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def fake_mode(graph: fx.Graph) -> Any:
    """The fake mode whose symbols the sizes of a graph use, or None for a graph without tensors."""
    for node in graph.nodes:
        known = node.meta.get("val")
        if isinstance(known, torch._subclasses.fake_tensor.FakeTensor):
            return known.fake_mode
    return None


def fake_like(tensor: torch.Tensor, near: fx.Node) -> torch.Tensor:
    """A fake of `tensor` in the fake mode used around a node, weights' sizes being constants."""
    mode = fake_mode(near.graph)
    if mode is None or isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor):
        return tensor
    return mode.from_tensor(tensor, static_shapes=True)


def module_fqn(node: fx.Node) -> str:
    """The FQN of the innermost module a node was traced in; empty when unknown or the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return names.path(str(list(stack.values())[-1][0]))


def name_modules(graph: fx.Graph) -> None:
    """Where modules of one graph have the same path below different beginnings, let their paths begin with those.

    Two models of one class in a function are then `query.layers.0` and `document.layers.0`. `graph` is a traced
    graph of ours; its nodes' `nn_module_stack` is replaced.
    """
    beginnings: dict[str, set[str]] = {}
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            path = str(list(stack.values())[-1][0])
            beginnings.setdefault(names.path(path), set()).add(names.ROOT.match(path)[0])  # type: ignore[index]
    if all(len(found) < 2 for found in beginnings.values()):
        return
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                k: (names.dotted(str(p)), *rest) for k, (p, *rest) in stack.items()
            }


def module_types(node: fx.Node) -> list[str]:
    """Class names of the modules around a node, outermost first."""
    names = []
    for _, kind in (node.meta.get("nn_module_stack") or {}).values():
        names.append(kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1])
    return names


def sequence_of(argument: Any) -> Sequence[Any]:
    """A graph's list argument as a sequence, also when it is missing."""
    return argument if isinstance(argument, (list, tuple)) else ()


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """A call's argument by its name in the operator's schema. Left out: the schema's default, or `default` where
    that is given or the schema has no such argument."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, known in enumerate(target._schema.arguments):
        if known.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, known.default_value if default is None else default)
    return default
