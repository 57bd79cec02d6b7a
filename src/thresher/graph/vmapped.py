"""`torch.vmap` in a captured graph: each mapped stretch becomes one function, traced by itself to plain operators.

Dynamo writes a vmap as it runs: `_vmap_increment_nesting`, tensors that gain a hidden batch dimension, the mapped
operators, tensors that lose it again, `_vmap_decrement_nesting`. Traced before dispatch, the operators between are on
tensors that the tracer does not know, and their results would become constants without values. Below dispatch, vmap
has turned them into operators on whole tensors; so a stretch is traced there, on its own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError
from .tracing import trace

_OPENS, _CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


class _Mapped:
    """One stretch: its nodes and their inputs, and a call that runs the operators it comes to."""

    def __init__(self, source: fx.GraphModule, nodes: Sequence[fx.Node]):
        inside = set(nodes)
        self.inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
        self.outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        self.stack = next((n.meta["nn_module_stack"] for n in nodes if "nn_module_stack" in n.meta), None)
        graph, copied = fx.Graph(), {}
        for node in self.inputs:
            copied[node] = graph.placeholder(node.name)
        for node in nodes:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
        graph.output(tuple(copied[n] for n in self.outputs))
        self._body = fx.GraphModule(source, graph)

    def traced(self) -> fx.GraphModule:
        """The stretch as plain operators on whole tensors, from the fake values that the graph carries."""
        known = [_value(n) for n in self.inputs]
        plain = trace(lambda *given: fx.Interpreter(self._body).run(*given), known, before_dispatch=False)
        for node in plain.graph.nodes:
            if self.stack is not None:
                node.meta["nn_module_stack"] = self.stack
        return plain


def _value(node: fx.Node) -> Any:
    found = node.meta.get("example_value", node.meta.get("val"))
    if found is None:
        raise CaptureError(
            f"{node.name} goes into a torch.vmap, and the captured graph does not say what it is."
        )
    return found


def without_vmap(source: fx.GraphModule, fake_mode: Any) -> fx.GraphModule:
    """The graph with each vmap as plain operators; the very graph where it has none. The given one is not edited."""
    stretches, depth, current = [], 0, []
    for node in source.graph.nodes:
        if depth or _name(node) == _OPENS:
            current.append(node)
            depth += (_name(node) == _OPENS) - (_name(node) == _CLOSES)
            if depth == 0:
                stretches.append(current)
                current = []
    if depth:
        raise CaptureError("A torch.vmap is opened in this graph and closed in another one.")
    if not stretches:
        return source
    last = {nodes[-1]: nodes for nodes in stretches}
    inside = {n for nodes in stretches for n in nodes}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    held: dict[str, Any] = {}
    for node in source.graph.nodes:
        if node not in inside:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
            if node.op in ("get_attr", "call_module"):
                held[str(node.target)] = operator.attrgetter(str(node.target))(source)
        elif node in last:
            mapped = _Mapped(source, last[node])
            with fake_mode, torch.no_grad():
                plain = mapped.traced()
            values = dict(zip([n for n in plain.graph.nodes if n.op == "placeholder"], mapped.inputs))
            values = {place: copied[given] for place, given in values.items()}
            for inner in plain.graph.nodes:
                if inner.op == "get_attr":
                    name = f"_vmap_constant_{len(graph.nodes)}"
                    held[name] = getattr(plain, str(inner.target))
                    values[inner] = graph.get_attr(name)
            results: Any = graph.graph_copy(plain.graph, values)
            copied.update(zip(mapped.outputs, results))
    return fx.GraphModule(held, graph)
