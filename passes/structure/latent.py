"""Finds what attention compresses hidden states into (MLA), and operands put together of a rotated and a plain part.

latent = norm(hidden @ down)[..., :rank]        queries, or keys and values, are  latent @ up
key    = cat(plain [heads], rotated [one head, shared by all])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value

from .pattern import is_cast, uncast
from .sites import Latent, LinearSite, NormSite, Projection, Rope
from .views import Unviewable, behind_views, feature_rows, is_view, viewed

aten = torch.ops.aten


def continued(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """A cache's values [batch, heads, tokens, dim] that new ones are put behind, or None, and the new ones."""
    if node.target is aten.cat.default and len(node.args) == 2 and node.args[1] in (2, -2):
        parts: Any = node.args[0]
        if len(parts) == 2 and parts[0].op == "placeholder":
            return parts[0], parts[1]
    return None, node


def two_parts(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two parts of each head [batch, heads, tokens, dim] that a node puts side by side, each before one head of it
    is repeated for all; None for another node."""
    node = uncast(node)
    if node.target is not aten.cat.default or value(node).dim() != 4 or node.args[1:] not in ((-1,), (3,)):
        return None
    given: Any = node.args[0]
    if len(given) != 2:
        return None
    first, second = (_of_one_head(n) for n in given)
    return first, second


def _of_one_head(node: fx.Node) -> fx.Node:
    source: Any = uncast(node)
    if source.target is aten.expand.default and value(source.args[0]).dim() == 4:
        before, after = value(source.args[0]).shape, value(source).shape
        if before[1] == 1 and after[1] != 1:
            return source.args[0]
    return node


def behind(rope: Rope, before: int) -> Rope:
    """The same rotation, of dimensions that stand behind so many others."""
    return Rope(rope.kind, rope.cos, rope.sin, rope.dim, rope.start + before)


def find_latents(
    linears: Mapping[fx.Node, LinearSite],
    norms: Mapping[fx.Node, NormSite],
    q: LinearSite,
    kv: LinearSite,
) -> tuple[Latent | None, Latent | None]:
    """What queries, and what keys and values, are made of where both come from one hidden state, and not both at once.

    linears, norms: by their results. q, kv: the linears whose results are queries, and keys and values.
    """
    if behind_views(q.x) is behind_views(kv.x):
        return None, None
    both = _latent(linears, norms, q), _latent(linears, norms, kv)
    for first, second in (both, (None, both[1]), (both[0], None)):
        starts = [site.x if latent is None else latent.down.x for site, latent in ((q, first), (kv, second))]
        if behind_views(starts[0]) is behind_views(starts[1]):
            return first, second
    return None, None


def _latent(
    linears: Mapping[fx.Node, LinearSite], norms: Mapping[fx.Node, NormSite], up: LinearSite
) -> Latent | None:
    node, scale, norm, past = up.x, 1.0, None, None
    steps: list[fx.Node] = []
    while node not in linears:
        factor = node.args[1] if node.target in (aten.mul.Tensor, aten.div.Tensor) else None
        if past is None and continued(node)[0] is not None:
            past, node = continued(node)
        elif norm is None and (site := norms.get(node)) is not None:
            norm, node, steps = site, site.input, []
        elif is_view(node):
            steps.append(node)
            node = viewed(node)
        elif is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        elif isinstance(factor, (int, float)):
            scale *= factor if node.target is aten.mul.Tensor else 1 / factor
            node = node.args[0]  # type: ignore[assignment]
        else:
            return None
    down = linears[node]
    try:
        rows = feature_rows(node, down.out_features, steps[::-1])
    except Unviewable:
        return None
    return Latent(down, rows, norm, up, scale, past) if len(rows) == up.in_features else None


def joined_rows(first: Projection, second: Projection) -> torch.Tensor:
    """Rows [heads, dim] of two parts side by side."""
    return torch.cat([first.rows, second.rows], 1)
