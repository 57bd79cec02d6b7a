"""Which nodes of a program go into engines: stretches of them, and the sizes that stand between."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import argument, value
from thresher.graph.program import Program
from thresher.ops import NAMESPACE

SMALLEST = 3  # nodes; fewer are not worth entering an engine for
TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool})
"""What an engine computes in: TensorRT has no other types of its own but those of quantized weights."""


@dataclass
class Run:
    """A stretch of nodes for one engine."""

    nodes: list[fx.Node] = field(default_factory=list)


def plain(node: fx.Node) -> bool:
    """Whether an engine can hold a node: ATen in types that TensorRT has, with sizes that do not depend on data."""
    target = node.target
    if target is operator.getitem:
        return plain(node.args[0])  # type: ignore[arg-type]
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags and not _without_dropout(node):
        return False
    results, given = tensors_of(value(node)), [t for a in node.all_input_nodes for t in tensors_of(value(a))]
    return bool(results) and all(t.dtype in TYPES for t in (*results, *given)) and not _by_data(results)


def _without_dropout(node: fx.Node) -> bool:
    """Whether it is attention, which is random with dropout alone."""
    is_attention = node.target is torch.ops.aten.scaled_dot_product_attention.default
    return is_attention and not argument(node, "dropout_p")


def is_ours(node: fx.Node) -> bool:
    """Whether a node calls an operator of the `thresher::` namespace."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE


def stretches(program: Program, inside: Callable[[fx.Node], bool]) -> list[Any]:
    """The program's tensor operators in order, those for one engine together; sizes are left to who needs them."""
    items: list[Any] = []
    home: dict[fx.Node, Run] = {}
    current: Run | None = None
    for node in program.nodes():
        if is_size(node):
            continue
        producer = node.args[0] if node.target is operator.getitem else None
        if isinstance(producer, fx.Node) and not _one_tensor(producer):
            if producer in home:
                home[producer].nodes.append(node)
                home[node] = home[producer]
            else:
                items.append(node)  # beside what it is a member of: it ends no stretch
            continue
        if inside(node):
            if current is None:
                current = Run()
                items.append(current)
            current.nodes.append(node)
            home[node] = current
        else:
            items.append(node)
            current = None
    flat: list[Any] = []
    for item in items:
        if isinstance(item, Run) and len(item.nodes) < SMALLEST:
            flat += item.nodes
        else:
            flat.append(item)
    return flat


def is_size(node: fx.Node) -> bool:
    """Whether a node gives a number and no tensor."""
    return node.op in ("placeholder", "call_function") and not tensors_of(value(node))


def _one_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def tensors_of(known: Any) -> list[torch.Tensor]:
    """The tensors in what a node gives: itself, or members of several."""
    if isinstance(known, torch.Tensor):
        return [known]
    return [t for t in known if isinstance(t, torch.Tensor)] if isinstance(known, (tuple, list)) else []


def _by_data(tensors: Sequence[torch.Tensor]) -> bool:
    return any(isinstance(s, torch.SymInt) and s.node.hint is None for t in tensors for s in t.shape)


def dimension_of(size: Any, places: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """The tensor and dimension among `places` that has a symbolic size."""
    for place in places:
        known = value(place)
        if isinstance(known, torch.Tensor):
            for dim, s in enumerate(known.shape):
                if not isinstance(s, int) and str(s) == str(size):
                    return place, dim
    return None
