"""Cut a part out of a Program as a Program of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import fx

from thresher.compat import lazy_module
from thresher.graph.nodes import value
from thresher.graph.program import Program


def extract(program: Program, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Program:
    """The part of a program that computes `outputs` from `inputs`.

    inputs: nodes that become placeholders, in order; they need not all be used. outputs: nodes whose
    values are returned. Weights on the way come along, shared. Everything else that the outputs need
    must be computable from the inputs.
    """
    graph, mapping = fx.Graph(), {}
    result = Program(lazy_module(graph), {}, [node.name for node in inputs])
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta = copy.copy(node.meta)
    needed, stack = set(), [n for n in outputs if n not in mapping]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        if node.op == "placeholder":
            raise ValueError(f"{node.name} is needed for the outputs, and is not among the inputs")
        needed.add(node)
        stack += [n for n in node.all_input_nodes if n not in mapping]
    for node in program.graph.nodes:
        if node not in needed:
            continue
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = copy.copy(node.meta)
        if (weight := program.weight(node)) is not None:
            result.weights[str(node.target)] = weight
            result.graph_module.register_buffer(str(node.target), weight.tensor, persistent=False)
    graph.output(tuple(mapping[n] for n in outputs))
    result.graph_module.graph = graph
    result.clean()
    return result


def is_computed(node: object) -> bool:
    """Whether a graph argument is a tensor that an input decides, neither weight nor number."""
    return isinstance(node, fx.Node) and node.op != "get_attr" and isinstance(value(node), torch.Tensor)
