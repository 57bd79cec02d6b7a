"""Which nodes of a graph hold the residual stream, and whether it may be kept rotated.

The stream is followed forward from the embeddings and from every linear that writes to it. A node that reads
it is fine when it commutes with an orthogonal map of the last dimension (adding streams, scaling by one number,
slicing other dimensions, casts), or when it is a norm whose result goes into linears alone. Anything else is a
reason why this stream cannot be rotated. The proof is by operator, so that no assumption about an architecture
is left unchecked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import sequence_of, value
from thresher.graph.program import Program

from ..structure.pattern import CASTS, described, uncast
from ..structure.recover import LinearSite, NormSite, Structure, Tower

aten = torch.ops.aten

_ROTATABLE = ("token", "position", "token_type")
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


class NotRotatable(Exception):
    """Why a residual stream cannot be kept rotated, as a full sentence."""


_WITH_DEFT = (
    " DEFT took MLPs of this model, and their weights are not rotated: quantize with rotate=False and rotate_down=False to "
    "use both, or leave deft out."
)


@dataclass
class Stream:
    """A residual stream that may be rotated.

    width: of the hidden state. norms: those that read it, in graph order, and the linears each one feeds.
    writers: linears that add to it. centred: its norms are layer norms, so that writers must be centred.
    """

    tower: Tower
    width: int
    norms: dict[NormSite, list[LinearSite]] = field(default_factory=dict)
    writers: list[LinearSite] = field(default_factory=list)
    centred: bool = False


def follow(program: Program, structure: Structure, tower: Tower) -> Stream:
    """The stream of a tower. Raises NotRotatable."""
    for layer in tower.layers:
        if not layer.complete:
            raise NotRotatable(
                f"Layer {layer.fqn} was not recovered whole, so the stream's writers are unknown."
                + (
                    _WITH_DEFT
                    if any(str(n.target).startswith("thresher.sparse_") for n in program.graph.nodes)
                    else ""
                )
            )
    if not tower.embeddings:
        raise NotRotatable(f"What starts the stream of {tower.layers[0].fqn} was not recovered.")
    for embedding in tower.embeddings:
        if embedding.kind not in _ROTATABLE or embedding.weight is None:
            raise NotRotatable(
                f"The stream starts from {embedding.fqn} ({embedding.kind}), and only look-ups in a table are rotated."
            )
        if embedding.node.target is not aten.embedding.default:
            raise NotRotatable(f"{embedding.fqn} is added whole, not looked up.")
    writers = [b.site.linears[-1] for layer in tower.layers for b in layer.branches]
    stream = Stream(tower, value(tower.layers[0].input).shape[-1], writers=writers)
    held = {e.node for e in tower.embeddings} | {w.output for w in writers}
    inside = {n: norm for norm in structure.norms for n in norm.nodes}
    by_input: dict[fx.Node, list[NormSite]] = {}
    for norm in structure.norms:
        by_input.setdefault(uncast(norm.input), []).append(norm)
    found: list[NormSite] = []
    for node in program.graph.nodes:
        if node in held:
            found += by_input.get(node, [])
            continue
        sources = [a for a in node.all_input_nodes if a in held]
        if not sources or (node.op != "output" and not isinstance(value(node), torch.Tensor)):
            continue
        if node in inside and uncast(inside[node].input) in held:
            continue
        _check(program, node, held)
        held.add(node)
        if node.target not in CASTS:
            found += by_input.get(node, [])
    kinds = {norm.kind for norm in found}
    if len(kinds) != 1:
        raise NotRotatable(
            f"Its norms are of {len(kinds)} kinds; a stream is either centred for layer norms or it is not."
        )
    stream.centred = kinds == {"layer"}
    stream.norms = {norm: _readers(structure, norm) for norm in found}
    if any(value(n.output).shape[-1] != stream.width for n in found):
        raise NotRotatable("A norm works on another width than the stream has.")
    return stream


def _check(program: Program, node: fx.Node, held: set[fx.Node]) -> None:
    """Raise NotRotatable unless the node's result is the rotated stream when its operands are."""
    if node.op == "output":
        given = next(a for a in node.all_input_nodes if a in held)
        raise NotRotatable(
            f"The model returns hidden states ({described(given)}), which would come out rotated."
        )
    target, args = node.target, node.args
    if target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        apart = [a for a in args[:2] if not isinstance(a, fx.Node) or a not in held]
        if not apart:
            return
        raise NotRotatable(
            f"{described(node)} adds {described(apart[0])} to the residual stream, which no linear or look-up writes "
            f"there directly; a norm after the branch or around the embeddings stops a rotation."
        )
    elif (target in _SCALES and args[0] in held) or (target is aten.mul.Tensor and args[1] in held):
        other = args[1] if args[0] in held else args[0]
        if not isinstance(other, fx.Node) or _is_one_number(program, other):
            return
    elif target in CASTS:
        return
    elif target in (aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.narrow.default):
        rank = value(args[0]).dim()
        if int(args[1] if len(args) > 1 else 0) % rank != rank - 1:  # type: ignore[arg-type]
            return
    elif target in (aten.unsqueeze.default, aten.squeeze.dim):
        rank = value(args[0]).dim() + (target is aten.unsqueeze.default)
        if int(args[1]) % rank != rank - 1:  # type: ignore[arg-type]
            return
    elif target in (aten.reshape.default, aten.expand.default, aten.index.Tensor):
        last, width = value(node).shape[-1], value(args[0]).shape[-1]
        indices = sequence_of(args[1]) if target is aten.index.Tensor else ()
        if isinstance(last, int) and last == width and len(indices) < value(args[0]).dim():
            return
    raise NotRotatable(f"{described(node)} reads the residual stream and does not commute with a rotation.")


def scaled_by_number(node: fx.Node) -> bool:
    """Whether a node only multiplies or divides by a number that stands in the graph."""
    return node.target in _SCALES and isinstance(node.args[1], (int, float))


def _is_one_number(program: Program, node: fx.Node) -> bool:
    known = value(node)
    return not isinstance(known, torch.Tensor) or known.dim() == 0 or known.numel() == 1


def _readers(structure: Structure, norm: NormSite) -> list[LinearSite]:
    """The linears that a norm's result goes into. Raises NotRotatable when something else reads it."""
    by_x: dict[fx.Node, list[LinearSite]] = {}
    for site in structure.linears:
        by_x.setdefault(site.x, []).append(site)
    found: list[LinearSite] = []
    stack = [norm.output]
    while stack:
        node = stack.pop()
        sites = by_x.get(node, [])
        found += sites
        entered = {site.node for site in sites} | {a for s in sites for a in s.node.all_input_nodes}
        for user in node.users:
            if user in entered or (not isinstance(value(user), torch.Tensor) and user.op != "output"):
                continue
            if _keeps_last(user) or (norm.bias is None and scaled_by_number(user)):
                stack.append(user)
                continue
            what = "the output" if user.op == "output" else described(user)
            raise NotRotatable(
                f"Norm {norm.fqn} is read by {what}, not by linears alone, so its scale cannot be fused."
            )
    return found


def _keeps_last(node: Any) -> bool:
    """A slice of the tokens, as before a head that is asked for the last ones only."""
    if node.target not in (aten.slice.Tensor, aten.select.int):
        return False
    rank = value(node.args[0]).dim()
    return int(node.args[1] if len(node.args) > 1 else 0) % rank != rank - 1
