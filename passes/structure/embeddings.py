"""Finds what starts a residual stream: look-ups, patches, learned tokens, and their norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.compat import has_values
from thresher.graph.nodes import module_fqn, sequence_of, value
from thresher.graph.program import Program

from .pattern import CASTS, uncast
from .sites import LinearSite, NormSite
from .tower import EmbeddingSite
from .views import VIEWS

aten = torch.ops.aten

_MOST_TYPES = 16  # models have one to four token types, and hundreds of positions
_SAME = VIEWS | {aten.expand.default, aten.to.dtype}
_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
}


def find_embeddings(
    program: Program, start: fx.Node, norms: dict[fx.Node, NormSite], linears: dict[fx.Node, LinearSite]
) -> tuple[list[EmbeddingSite], NormSite | None]:
    """The embeddings that add up to `start`, and the norm they go through together, if any.

    linears: by output; those without a role between the embeddings and `start` get the role "embedding".
    """
    found: list[EmbeddingSite] = []
    norm = None
    stack: list[tuple[fx.Node, float | str | None]] = [(start, None)]
    seen = set()
    while stack:
        node, scale = stack.pop()
        node = uncast(node)
        if node in seen:
            continue
        seen.add(node)
        held = program.weight(node)
        if node in linears:
            if not linears[node].role:
                linears[node].role = "embedding"
                stack.append((linears[node].x, scale))
        elif node in norms:
            norm = norm or norms[node]
            stack.append((norms[node].input, scale))
        elif node.target is aten.embedding.default:
            weight = str(node.args[0].target) if program.weight(node.args[0]) else None  # type: ignore[union-attr]
            found.append(EmbeddingSite("", _name(program, node, weight), node, weight, scale))
        elif node.target in _CONVOLUTIONS:
            found.append(
                EmbeddingSite(
                    "patch",
                    _name(program, node, str(node.args[1].target)),
                    node,
                    str(node.args[1].target),
                    scale,
                )
            )  # type: ignore[union-attr]
        elif held is not None:
            found.append(EmbeddingSite("position", held.fqn, node, str(node.target), scale))
        elif node.op == "placeholder":
            found.append(EmbeddingSite("input", node.name, node, None, scale))
        elif node.target in (aten.add.Tensor, aten.cat.default):
            parts = node.args if node.target is aten.add.Tensor else sequence_of(node.args[0])
            for part in reversed([p for p in parts if isinstance(p, fx.Node)]):
                if node.target is aten.cat.default and (token := _stored(program, part)) is not None:
                    found.append(EmbeddingSite("prefix", program.weights[token].fqn, part, token, scale))
                else:
                    stack.append((part, scale))
        elif node.target is aten.mul.Tensor:
            factor, other = _factor(program, node)
            if other is not None:
                stack.append((other, factor))
        elif node.target in _SAME or node.target in (aten.masked_scatter.default, aten.masked_fill.Scalar):
            stack.append((node.args[0], scale))  # type: ignore[arg-type]
    _name_kinds(program, found)
    return found, norm


def _factor(program: Program, node: fx.Node) -> tuple[float | str | None, fx.Node | None]:
    for factor, other in (node.args, node.args[::-1]):
        source = factor  # the number may be stored as an integer
        while isinstance(source, fx.Node) and source.target in CASTS:
            source = source.args[0]
        held = program.weight(source)
        if isinstance(factor, (int, float)):
            return float(factor), other  # type: ignore[return-value]
        if held is not None and held.tensor.dim() == 0:
            return str(source.target), other  # type: ignore[return-value,union-attr]
    return None, None


def _stored(program: Program, node: Any) -> str | None:
    while isinstance(node, fx.Node) and node.target in _SAME:
        node = node.args[0]
    return str(node.target) if program.weight(node) is not None else None


def _name(program: Program, node: fx.Node, weight: str | None) -> str:
    return (
        program.weights[weight].fqn.rsplit(".", 1)[0] if weight is not None else module_fqn(node) or node.name
    )


def _name_kinds(program: Program, found: list[EmbeddingSite]) -> None:
    """Tell tokens, positions and token types apart by where the looked-up indices come from."""
    looked_up = [e for e in found if not e.kind]
    from_caller = [e for e in looked_up if _origin(program, e.node.args[1]) == "caller"]
    tokens = max(from_caller, key=lambda e: value(e.node.args[0]).shape[0], default=None)
    for site in looked_up:
        origin = _origin(program, site.node.args[1])
        if site is tokens:
            site.kind = "token"
        elif origin == "computed":
            site.kind = "position"
        elif origin == "caller":
            shared = tokens is not None and site.weight == tokens.weight
            few = value(site.node.args[0]).shape[0] <= _MOST_TYPES
            site.kind = "token_type" if shared or (few and "position" not in site.fqn) else "position"
        else:
            site.kind = _buffer_kind(program, site)


def _buffer_kind(program: Program, site: EmbeddingSite) -> str:
    """Positions count up and token types do not; without values, the name of the buffer tells."""
    held = _origin_weight(program, site.node.args[1])
    if held is None:
        return "position"
    tensor = program.weights[held].tensor
    if not has_values(tensor):
        return "position" if "position" in program.weights[held].fqn else "token_type"
    row = tensor.reshape(-1, tensor.shape[-1])[0]
    return "position" if torch.equal(row, torch.arange(len(row), device=row.device)) else "token_type"


_PASSING = _SAME | {aten.add.Tensor, aten.gather.default, aten.index_select.default}


def _source(node: Any) -> fx.Node:
    while isinstance(node, fx.Node) and node.target in _PASSING:
        if node.target is aten.add.Tensor and not isinstance(node.args[1], (int, float)):
            break
        node = node.args[0]
    return node


def _origin(program: Program, node: Any) -> str:
    """Where indices come from: "caller", a "buffer" of the model, or "computed"."""
    source = _source(node)
    if source.op == "placeholder":
        return "caller"
    return "buffer" if program.weight(source) is not None else "computed"


def _origin_weight(program: Program, node: Any) -> str | None:
    source = _source(node)
    return str(source.target) if program.weight(source) is not None else None
