"""Follows the residual stream: which additions carry it, and which sites hang on it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.graph.program import Program
from thresher.report import Miss

from .pattern import is_cast, uncast
from .sites import AttentionSite, MlpSite, NormSite
from .tower import Branch
from .views import behind_views, is_view

aten = torch.ops.aten


@dataclass
class Norms:
    """Norms by what they read and by their result, both behind views and casts."""

    by_input: dict[fx.Node, list[NormSite]] = field(default_factory=dict)
    by_output: dict[fx.Node, NormSite] = field(default_factory=dict)

    @classmethod
    def of(cls, norms: Sequence[NormSite]) -> Norms:
        """These norms, to be found by what they read and by what they give."""
        found = cls(by_output={behind_views(n.output): n for n in norms})
        for norm in norms:
            found.by_input.setdefault(behind_views(norm.input), []).append(norm)
        return found


def find_branch(
    site: AttentionSite | MlpSite, norms: Norms, program: Program, outputs: set[fx.Node]
) -> Branch | None:
    """How a site hangs on the residual stream, or None when no addition brings the two together.

    outputs: results of all sites; a sum of two of them on the way is a parallel layer's.
    """
    read = _unturned(behind_views(site.x))
    pre_norm = norms.by_output.get(read)
    streams: dict[fx.Node, NormSite | None] = {read: None}
    if pre_norm is not None:
        streams[behind_views(pre_norm.input)] = pre_norm
    node, adds, post_norm, scale = site.output, [], None, None
    for _ in range(12):
        step = _next(node, norms, program, post_norm is None)
        if step is None:
            return None
        node, how = step
        if isinstance(how, NormSite):
            post_norm = how
        elif isinstance(how, (int, float, str)):
            scale = how
        elif isinstance(how, fx.Node):  # an addition; `how` is its other operand
            adds.append(node)
            carried = _stream_in(how, streams, norms, outputs)
            if carried is not None:
                pre_norm = streams[behind_views(carried)]
                return Branch(site, carried, node, tuple(adds), pre_norm, post_norm, scale=scale)
            if not _is_result(how, norms, outputs):
                return None
    return None


def _next(node: fx.Node, norms: Norms, program: Program, may_norm: bool) -> tuple[fx.Node, Any] | None:
    """The next value on the way to the stream and what happens there; None where the way ends or forks."""
    following = norms.by_input.get(behind_views(node), []) if may_norm else []
    inside = {n for norm in following for n in norm.nodes}
    users = [
        u
        for u in node.users
        if u.op != "output" and u not in inside and not _only_into(u, inside) and not _looks(u)
    ]
    if len(following) == 1 and not users:
        return following[0].output, following[0]
    if following or len(users) != 1:
        return None
    user = users[0]
    if is_cast(user) or is_view(user):
        return user, None
    if user.target is aten.add.Tensor and not user.kwargs:
        other = user.args[1] if user.args[0] is node else user.args[0]
        return (user, other) if isinstance(other, fx.Node) else None
    if user.target is aten.mul.Tensor:
        factor = user.args[1] if user.args[0] is node else user.args[0]
        held = program.weight(uncast(factor))
        if isinstance(factor, (int, float)):
            return user, factor
        if held is not None and held.tensor.dim() <= 1:
            return user, str(uncast(factor).target)
    return None


def _unturned(node: fx.Node) -> fx.Node:
    """The hidden state that linears read turned, by a rotation that stands for nothing but their codes."""
    turned = str(node.target) == "thresher.hadamard.default"
    return behind_views(node.args[0]) if turned else node


def _looks(node: fx.Node) -> bool:
    """Whether an operator only measures what a branch gives, as token pruning does."""
    return str(node.target) == "thresher.token_transition.default"


def _only_into(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a cast feeds nothing but a norm."""
    return (
        is_cast(node) and bool(node.users) and all(u in inside or _only_into(u, inside) for u in node.users)
    )


def _stream_in(
    node: fx.Node, streams: Container[fx.Node], norms: Norms, outputs: set[fx.Node]
) -> fx.Node | None:
    """The stream itself, also where a parallel layer has added another site's result to it already."""
    if behind_views(node) in streams:
        return node
    inner = behind_views(node)
    if inner.target is aten.add.Tensor and all(isinstance(a, fx.Node) for a in inner.args):
        for stream, other in (inner.args, inner.args[::-1]):
            if behind_views(stream) in streams and _is_result(other, norms, outputs):  # type: ignore[arg-type]
                return stream  # type: ignore[return-value]
    return None


def _is_result(node: fx.Node, norms: Norms, outputs: set[fx.Node]) -> bool:
    """Whether this is a site's result, behind views, a norm or a factor."""
    for _ in range(6):
        node = behind_views(node)
        if node in outputs:
            return True
        if node in norms.by_output:
            node = norms.by_output[node].input
        elif node.target is aten.mul.Tensor and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return False
    return False


_ADRIFT = (
    "No addition brings its result together with the hidden state that it reads, so it is on no residual "
    "stream and in no layer."
)


def find_branches(
    sites: Sequence[AttentionSite | MlpSite], norms: Norms, program: Program
) -> tuple[list[Branch], list[Miss]]:
    """Branches in the order of their additions; a Miss for each attention that hangs on no stream."""
    outputs = {s.output for s in sites}
    branches, missed = [], []
    for site in sites:
        branch = find_branch(site, norms, program, outputs)
        if branch is not None:
            branches.append(branch)
        elif isinstance(site, AttentionSite):
            missed.append(Miss(site.fqn, _ADRIFT))
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(branches, key=lambda b: (position[b.add], position[b.site.output])), missed


def link(branches: Sequence[Branch], norms: Norms) -> list[list[list[Branch]]]:
    """Towers of layers of branches. Sets `stream_norm` where the stream itself is normalised."""
    made_by = {b.add: b for b in branches}
    towers: list[list[list[Branch]]] = []
    beside: dict[fx.Node, tuple[int, int]] = {}  # tower and layer of the branches that read a stream
    behind: dict[fx.Node, tuple[int, int]] = {}  # and of those whose addition made it
    for branch in branches:
        stream, carrier = behind_views(branch.stream), _carrier(branch, made_by, norms)
        if stream in beside:  # the other branch of a parallel layer
            tower, layer = beside[stream]
            towers[tower][layer].append(branch)
        elif carrier not in behind:
            towers.append([[branch]])
            tower, layer = len(towers) - 1, 0
        else:
            tower, layer = behind[carrier]
            if _begins_layer(branch, towers[tower][layer]):
                towers[tower].append([branch])
                layer += 1
            else:
                towers[tower][layer].append(branch)
        beside[stream] = behind[branch.add] = (tower, layer)
    for group in towers:
        _normalise_last(group, norms)
    return towers


_FURTHER = 4  # additions between a branch's stream and the one that made it, itself included


def _carrier(branch: Branch, made_by: dict[fx.Node, Branch], norms: Norms) -> fx.Node | None:
    """The addition whose result this branch's stream is, noting a norm that lies between them."""
    stream = behind_views(branch.stream)
    norm = norms.by_output.get(stream)
    if norm is not None and behind_views(norm.input) in made_by:
        stream = behind_views(norm.input)
        made_by[stream].stream_norm = norm
    return _made_before(stream, made_by)


def _made_before(stream: fx.Node, made_by: Container[fx.Node]) -> fx.Node | None:
    """The nearest of these additions behind others: of branches that were not recovered, of features added in between."""
    near = [stream]
    for _ in range(_FURTHER):
        found = [node for node in near if node in made_by]
        if found:
            return found[0] if len(found) == 1 else None
        sums = [node for node in near if node.target is aten.add.Tensor]
        near = [behind_views(a) for node in sums for a in node.args if isinstance(a, fx.Node)]
    return None


def _begins_layer(branch: Branch, layer: Sequence[Branch]) -> bool:
    if any(isinstance(b.site, MlpSite) for b in layer):
        return True
    return isinstance(branch.site, AttentionSite) and not branch.site.cross


def _normalise_last(tower: Sequence[Sequence[Branch]], norms: Norms) -> None:
    """The last addition of a post-norm model has its norm too, although no branch reads the result."""
    branches = [b for layer in tower for b in layer]
    last = branches[-1]
    if len(branches) > 1 and all(b.stream_norm for b in branches[:-1]) and last.stream_norm is None:
        after = norms.by_input.get(last.add, [])
        last.stream_norm = after[0] if len(after) == 1 else None
