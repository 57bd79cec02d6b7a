"""Finds attention: from the operator back to its projections, and on to its output linear.

Three spellings give the same site: `scaled_dot_product_attention`; matrix product, softmax, matrix
product ("eager": models with a soft cap or a position bias); and `thresher::varlen_attention` ("varlen",
after packing).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.graph.dialect import unrepeated
from thresher.graph.nodes import value
from thresher.graph.program import Program

from .masks import read_masks
from .pattern import Anything, Number, Var, call, described, either, is_cast, match, uncast
from .rope import find_rope
from .sdpa import attention
from .sinks import split_sinks, unshifted, without_sink
from .sites import AttentionSite, LinearSite, NormSite, Projection, Rope, Unknown, common_prefix
from .views import Unviewable, head_rows, is_view, merges_heads, viewed

aten = torch.ops.aten


@dataclass
class Parts:
    """Linears and norms already found, by the nodes that lead to them."""

    program: Program
    linears: dict[fx.Node, LinearSite]
    readers: dict[fx.Node, list[LinearSite]]
    norms: dict[fx.Node, NormSite]


@dataclass
class Core:
    """The arguments of one attention, whatever its spelling. Shapes [batch, heads, tokens, dim]."""

    node: fx.Node
    spelling: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    masks: tuple[fx.Node, ...]
    scale: float
    is_causal: bool = False
    softcap: float | None = None
    probabilities: fx.Node | None = None
    window: int = -1
    sinks: fx.Node | None = None


@dataclass
class Traced:
    """One operand followed back to its linear."""

    projection: Projection
    norm: NormSite | None
    rope: Rope | None
    scale: float
    past: fx.Node | None


def find_attention(core: Core, parts: Parts) -> AttentionSite:
    """The whole site around one attention core. Raises Unknown."""
    q, k, v = (
        trace(n, parts, f"Its {said}") for n, said in ((core.q, "query"), (core.k, "key"), (core.v, "value"))
    )
    if (q.rope is None and k.rope is not None) or (q.rope is not None and not _same_rope(q.rope, k.rope)):
        raise Unknown(
            "Its query and its key are rotated by different angles, or only one of them is rotated."
        )
    heads, head_dim = q.projection.rows.shape
    kv_heads, value_dim = v.projection.rows.shape
    if k.projection.rows.shape != (kv_heads, head_dim) or heads % kv_heads:
        raise Unknown(
            f"It has {heads} query heads of {head_dim}, {k.projection.rows.shape[0]} key heads of "
            f"{k.projection.rows.shape[1]} and {kv_heads} value heads, which do not fit together."
        )
    if v.scale != 1.0 or v.norm is not None or v.rope is not None:
        raise Unknown("Its values are scaled, normalised or rotated, which no known attention does.")
    if (k.past is None) != (v.past is None):
        raise Unknown("Only one of its keys and its values continues a cache.")
    output = _output_linear(core.node, heads * value_dim, parts)
    visibility = read_masks(core.masks, core.is_causal)
    if core.spelling == "varlen":
        visibility = type(visibility)("causal" if core.is_causal else visibility.kind, core.window)
    cross = q.projection.linear.x is not k.projection.linear.x
    return AttentionSite(
        fqn=common_prefix([p.projection.linear.fqn for p in (q, k, v)] + [output.fqn]),
        node=core.node, spelling=core.spelling, q=q.projection, k=k.projection, v=v.projection, o=output,
        q_norm=q.norm, k_norm=k.norm, rope=q.rope, masks=core.masks, visibility=visibility,
        scale=core.scale * q.scale * k.scale, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        value_dim=value_dim, softcap=core.softcap, cross=cross, probabilities=core.probabilities,
        past=(k.past, v.past) if k.past is not None and v.past is not None else None, sinks=core.sinks,
    )  # fmt: skip


def _same_rope(one: Rope, other: Rope | None) -> bool:
    return other is not None and all(
        getattr(one, f) == getattr(other, f) for f in ("kind", "cos", "sin", "dim")
    )


def trace(node: fx.Node, parts: Parts, subject: str) -> Traced:
    """Follow a query, key or value back to the linear that makes it. Raises Unknown."""
    steps, norm, rope, scale = [], None, None, 1.0
    result = node = unrepeated(uncast(node)) or node
    past, node = _continued(node)
    while node not in parts.linears:
        factor = node.args[1] if node.target in (aten.mul.Tensor, aten.div.Tensor) else None
        if (site := parts.norms.get(node)) is not None and norm is None:
            norm, node = site, site.input
        elif (rotated := find_rope(node)) is not None and rope is None:
            rope, node = rotated
        elif is_view(node):
            steps.append(node)
            node = viewed(node)
        elif is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        elif isinstance(factor, (int, float)) and norm is None:  # a factor before a norm has no effect
            scale *= factor if node.target is aten.mul.Tensor else 1 / factor
            node = node.args[0]  # type: ignore[assignment]
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
    return Traced(Projection(linear, rows, whole, result), norm, rope, scale, past)


def _continued(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """A cache's keys or values that the new ones are put behind, and the new ones."""
    if node.target is aten.cat.default and len(node.args) == 2 and node.args[1] in (2, -2):
        parts: Any = node.args[0]
        if len(parts) == 2 and parts[0].op == "placeholder":
            return parts[0], parts[1]
    return None, node


def _output_linear(node: fx.Node, width: int, parts: Parts) -> LinearSite:
    """The linear that reads all heads side by side."""
    steps: list[fx.Node] = []
    start = node
    if value(node).dim() == 3:  # a batched matrix product: the next view separates batch and heads
        start = node = next(iter(node.users))
        if value(node).dim() != 4:
            raise Unknown(
                f"Its result stays in {value(node).dim()} dimensions, where batch and heads are one."
            )
    while True:
        readers = parts.readers.get(node, [])
        if readers:
            if len(readers) == 1 and readers[0].in_features == width and merges_heads(start, steps):
                return readers[0]
            raise Unknown(
                f"{readers[0].fqn} reads its result, but not as [batch, tokens, heads * head_dim] with "
                "the heads in order."
            )
        users = [u for u in node.users if u.op != "output"]
        if len(users) != 1 or not (is_view(users[0]) or is_cast(users[0])):
            said = ", ".join(map(described, users)) or "nothing"
            raise Unknown(f"Its result does not lead to one output linear: {node.name} is read by {said}.")
        node = users[0]
        steps.append(node)


def cores(program: Program) -> Iterator[Core | tuple[fx.Node, str]]:
    """Every attention-like computation, or the node and a sentence why it is not one."""
    for node in program.nodes():
        name = str(node.target)
        if node.target is aten.scaled_dot_product_attention.default:
            yield _sdpa(node)
        elif name in ("thresher.varlen_attention.default", "thresher.varlen_attention_masked.default"):
            yield _varlen(node, masked="masked" in name)
        elif node.target in (aten.softmax.int, aten._softmax.default) and value(node).dim() in (3, 4):
            yield _eager(node)


def _sdpa(node: fx.Node) -> Core:
    site = attention(node)
    scale = value(site.q).shape[-1] ** -0.5 if site.scale is None else site.scale
    masks = () if site.mask is None else (site.mask,)
    return Core(node, "sdpa", site.q, site.k, site.v, masks, scale, site.causal)


def _varlen(node: fx.Node, masked: bool) -> Core:
    q, k, v, *rest = node.args
    if masked:
        return Core(node, "varlen", q, k, v, (rest[0],), rest[-1])  # type: ignore[arg-type]
    _, _, scale, causal, window, softcap, *sinks = rest
    lone: Any = sinks[0] if sinks else None
    return Core(node, "varlen", q, k, v, (), scale, causal, softcap or None, window=window, sinks=lone)  # type: ignore[arg-type]


_a, _b = Var("q"), Var("k")
_swapped = either(*(call(aten.transpose.int)(_b, i, j) for i, j in ((2, 3), (3, 2), (-1, -2), (-2, -1))),
                  call(aten.permute.default)(_b, [0, 1, 3, 2]))  # fmt: skip
_product = call(aten.matmul.default, aten.bmm.default)(_a, _swapped)
_scores = either(
    call(aten.mul.Tensor)(_product, Number("scale")),
    call(aten.div.Tensor)(_product, Number("divisor")),
    _product,
)
_alibi = call(aten.baddbmm.default)(Var("bias"), _a, _swapped, alpha=Number("scale"), beta=1.0)
_LOGITS = either(
    call(aten.mul.Tensor)(
        call(aten.tanh.default)(call(aten.div.Tensor)(_scores, Number("softcap"))), Number("softcap")
    ),
    _scores,
    call(aten.reshape.default)(_alibi, Anything()),
)


def _eager(softmax: fx.Node) -> Core | tuple[fx.Node, str]:
    if softmax.args[1] not in (-1, value(softmax).dim() - 1):
        return softmax, f"Its softmax works along dimension {softmax.args[1]}, not along the keys."
    masks: list[fx.Node] = []
    logits, sinks = split_sinks(unshifted(uncast(softmax.args[0])))
    found = match(_LOGITS, logits)
    while (
        not found and isinstance(logits, fx.Node) and logits.target is aten.add.Tensor and not logits.kwargs
    ):
        left, right = logits.args
        if match(_LOGITS, uncast(right)) and not match(_LOGITS, uncast(left)):
            left, right = right, left
        masks.append(right)  # type: ignore[arg-type]
        logits = uncast(left)
        found = match(_LOGITS, logits)
    if not found:
        return softmax, _strange(logits, found.reason)  # type: ignore[union-attr]
    if "bias" in found.values:
        masks.append(found["bias"])
    shown = softmax if sinks is None else without_sink(softmax)
    if shown is None:
        return softmax, "The probability of its sinks is not cut off before the product with the values."
    weighted, readers = shown, [u for u in shown.users if u.op != "output"]
    while len(readers) == 1 and (is_cast(readers[0]) or readers[0].target is aten.reshape.default):
        weighted = readers[0]
        readers = [u for u in weighted.users if u.op != "output"]
    if (
        len(readers) != 1
        or readers[0].target not in (aten.matmul.default, aten.bmm.default)
        or readers[0].args[0] is not weighted
    ):
        return softmax, "Its probabilities are not multiplied by values in one product."
    scale = found.get("scale", 1 / found.get("divisor", 1.0))
    values: Any = readers[0].args[1]
    return Core(readers[0], "eager", found["q"], found["k"], values, tuple(masks[::-1]), float(scale),
                softcap=found.get("softcap"), probabilities=shown, sinks=sinks)  # fmt: skip


def _strange(logits: Any, reason: str) -> str:
    """Why a softmax's logits are no scores with masks: what they are where that has a name, else what did not match."""
    node, steps = logits, 0
    while (
        isinstance(node, fx.Node)
        and steps < 4
        and node.target in (aten.sub.Tensor, aten.to.dtype, aten._to_copy.default)
    ):
        node, steps = node.args[0], steps + 1
    if isinstance(node, fx.Node) and node.target is aten.cat.default:
        return f"Its softmax runs over more than the keys ({described(node)}), and that is no score stored for each head."
    if isinstance(node, fx.Node) and node.target in (
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
    ):
        return f"Its scores are hidden by {described(node)}, and masks are read where they are added to the scores."
    return f"Its softmax is not over products of queries and keys: {reason}."
