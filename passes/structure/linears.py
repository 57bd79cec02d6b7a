"""Finds every linear: `linear`, `addmm`, `mm` or `matmul` by a weight, with reshapes and biases around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program
from thresher.graph.sizes import same_size
from thresher.report import Miss

from .pattern import CASTS
from .sites import LinearSite

aten = torch.ops.aten

PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


def find_linears(program: Program) -> tuple[list[LinearSite], list[Miss]]:
    """Every linear in graph order, and a Miss for each `linear` whose weight the graph computes."""
    found, missed = [], []
    for node in program.nodes(*PRODUCTS):
        site = _read(program, node)
        if isinstance(site, LinearSite):
            found.append(site)
        elif site is not None:
            missed.append(Miss(module_fqn(node) or node.name, site))
    return found, missed


def stored_weight(program: Program, argument: Any) -> tuple[fx.Node, bool] | None:
    """The weight an argument reads, and whether it is read transposed; None when it is computed otherwise."""
    flipped = False
    while isinstance(argument, fx.Node) and argument.op == "call_function":
        if argument.target in (aten.t.default, aten.numpy_T.default) or _swaps_two(argument):
            flipped = not flipped
        elif argument.target not in CASTS:
            return None
        argument = argument.args[0]
    known = program.weight(argument)
    return (argument, flipped) if known is not None and known.tensor.dim() == 2 else None


def _swaps_two(node: fx.Node) -> bool:
    if node.target is aten.transpose.int:
        return {d % 2 for d in node.args[1:3]} == {0, 1} and value(node).dim() == 2  # type: ignore[operator]
    return node.target is aten.permute.default and list(node.args[1]) in ([1, 0], [-1, -2])  # type: ignore[arg-type]


def _read(program: Program, node: fx.Node) -> LinearSite | str | None:
    """The site, a sentence why a linear is not one, or None for a product that is no linear."""
    bias = None
    if node.target is aten.addmm.default:
        bias, x, factor = node.args[:3]
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return "It scales its product or its bias (addmm with alpha or beta), which no linear does."
    else:
        x, factor = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    read = stored_weight(program, factor)
    if read is None:
        if node.target is not aten.linear.default:
            return None
        how = f"{factor.name} ({factor.target})" if isinstance(factor, fx.Node) else repr(factor)
        return f"Its weight is computed in the graph by {how}; only a stored weight can be rewritten."
    if not isinstance(x, fx.Node):
        return None
    stored, flipped = read
    transposed = flipped if node.target is aten.linear.default else not flipped
    rows, columns = program.weights[str(stored.target)].tensor.shape
    in_features, out_features = (rows, columns) if transposed else (columns, rows)
    bias_name = None
    if bias is not None:
        held = program.weight(bias)
        if held is None or held.tensor.dim() != 1:
            return f"Its bias is {bias}, which is not a vector that the model stores."
        bias_name = str(bias.target)  # type: ignore[union-attr]
    outer_x, output = _outside_reshapes(node, x)
    if bias is None:
        output, bias_name = _added_bias(program, output, out_features)
    fqn = program.weights[str(stored.target)].fqn
    tied = len(stored.users) > 1
    name = fqn.removesuffix(".weight")
    if any(u.target is aten.embedding.default for u in stored.users):
        name = module_fqn(node) or name
    return LinearSite(
        name,
        node,
        outer_x,
        output,
        str(stored.target),
        fqn,
        bias_name,
        in_features,
        out_features,
        transposed,
        tied,
    )


def _outside_reshapes(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Input and output outside a pair of reshapes that only flatten and restore the leading dimensions."""
    users = list(node.users)
    if x.target is not aten.reshape.default or len(users) != 1 or users[0].target is not aten.reshape.default:
        return x, node
    before, after = x.args[0], users[0]
    outer, inner = value(before).shape, value(after).shape
    restores = len(outer) == len(inner) and all(same_size(a, b) for a, b in zip(outer[:-1], inner[:-1]))
    keeps = same_size(outer[-1], value(x).shape[-1]) and same_size(inner[-1], value(node).shape[-1])
    return (before, after) if restores and keeps and value(x).dim() == 2 else (x, node)  # type: ignore[return-value]


def _added_bias(program: Program, output: fx.Node, width: int) -> tuple[fx.Node, str | None]:
    users = list(output.users)
    if len(users) == 1 and users[0].target is aten.add.Tensor and not users[0].kwargs:
        for argument in users[0].args:
            held = program.weight(argument)
            if held is not None and held.tensor.shape == (width,):
                return users[0], str(argument.target)  # type: ignore[union-attr]
    return output, None
