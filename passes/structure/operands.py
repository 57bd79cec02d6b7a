"""Follows a query, key or value back to the linear that makes it, or the two of a key of two parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thresher.graph.dialect import unrepeated
from thresher.graph.nodes import value
from thresher.graph.program import Program

from .latent import behind, continued, joined_rows, two_parts
from .pattern import described, is_cast, uncast
from .rope import find_rope
from .sites import LinearSite, NormSite, Projection, Rope, Unknown
from .views import Unviewable, head_rows, is_view, viewed

aten = torch.ops.aten


@dataclass
class Parts:
    """Linears and norms already found, by the nodes that lead to them."""

    program: Program
    linears: dict[fx.Node, LinearSite]
    readers: dict[fx.Node, list[LinearSite]]
    norms: dict[fx.Node, NormSite]


@dataclass
class Traced:
    """One operand followed back to its linear. shared: a part of its heads that comes from another one. by_token: it
    is multiplied by a number for each token too."""

    projection: Projection
    norm: NormSite | None
    rope: Rope | None
    scale: float
    past: fx.Node | None
    shared: Projection | None = None
    by_token: bool = False


def trace(node: fx.Node, parts: Parts, subject: str) -> Traced:
    """Follow a query, key or value back to the linear that makes it. Raises Unknown."""
    norm, rope, scale, by_token = None, None, 1.0, False
    steps: list[fx.Node] = []
    result = node = unrepeated(uncast(node)) or node
    past, node = continued(node)
    while node not in parts.linears:
        factor = node.args[1] if node.target in (aten.mul.Tensor, aten.div.Tensor) else None
        if (site := parts.norms.get(node)) is not None and norm is None:
            norm, node = site, site.input
        elif (rotated := find_rope(node)) is not None and rope is None:
            rope, node = rotated
        elif not steps and norm is None and rope is None and (two := two_parts(node)) is not None:
            return _joined(two, result, parts, subject, Traced(None, None, None, scale, past, None, by_token))  # type: ignore[arg-type]
        elif is_view(node):
            steps.append(node)
            node = viewed(node)
        elif is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        elif isinstance(factor, (int, float)) and norm is None:  # a factor before a norm has no effect
            scale *= factor if node.target is aten.mul.Tensor else 1 / factor
            node = node.args[0]  # type: ignore[assignment]
        elif (scaled := _scaled_by_token(node)) is not None:
            by_token, node = True, scaled
        else:
            raise Unknown(
                f"{subject} does not lead back to one linear: {described(node)} is neither a view, a norm, "
                "a rotary embedding nor a constant factor."
            )
    linear = parts.linears[node]
    if steps and value(result).dim() == 3:  # [batch * heads, tokens, dim], for a batched matrix product
        steps = steps[1:]
    try:
        rows = head_rows(node, linear.out_features, steps[::-1])
    except Unviewable as reason:
        raise Unknown(f"{subject} is not laid out as [batch, heads, tokens, head_dim]: {reason}.") from None
    whole = torch.equal(rows.flatten(), torch.arange(linear.out_features))
    return Traced(Projection(linear, rows, whole, result), norm, rope, scale, past, None, by_token)


def _joined(
    two: tuple[fx.Node, fx.Node], result: fx.Node, parts: Parts, subject: str, so_far: Traced
) -> Traced:
    """An operand of two parts side by side: of one linear, or of two, of which the second's is shared by all heads."""
    first, second = (trace(part, parts, subject) for part in two)
    if (
        first.shared is not None
        or second.shared is not None
        or first.norm is not None
        or second.norm is not None
    ):
        raise Unknown(f"{subject} is put together of more than two parts, or of parts that are normalised.")
    if first.scale != second.scale or first.by_token != second.by_token or (first.rope and second.rope):
        raise Unknown(f"{subject} is put together of two parts that are scaled apart, or both rotated.")
    before = first.projection.rows.shape[1]
    rope = first.rope if first.rope is not None else second.rope and behind(second.rope, before)
    pasts = {t.past for t in (so_far, first, second)} - {None}
    if len(pasts) > 1:
        raise Unknown(f"{subject} continues two caches.")
    linear = first.projection.linear
    shared, rows, whole = None, first.projection.rows, False
    if second.projection.linear is linear and len(rows) == len(second.projection.rows):
        rows = joined_rows(first.projection, second.projection)
        whole = torch.equal(rows.flatten(), torch.arange(linear.out_features))
    elif len(second.projection.rows) == 1:
        shared = second.projection
    else:
        raise Unknown(f"{subject} is put together of two linears, and neither's part is shared by all heads.")
    return Traced(
        Projection(linear, rows, whole, result), None, rope, so_far.scale * first.scale, next(iter(pasts), None),
        shared, so_far.by_token or first.by_token,
    )  # fmt: skip


def _scaled_by_token(node: fx.Node) -> fx.Node | None:
    """What is multiplied by one number for each token, such as a temperature by position; None for another node."""
    if node.target is not aten.mul.Tensor or value(node).dim() != 4:
        return None
    left, right = node.args
    if not isinstance(right, fx.Node) or not isinstance(left, fx.Node):
        return None
    known = value(right)
    one = known.dim() == 4 and known.shape[1] == 1 and known.shape[3] == 1
    return left if one and not known.is_complex() else None
