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

from thresher.graph.nodes import value
from thresher.graph.program import Program

from .latent import find_latents
from .masks import read_masks
from .operands import Parts, trace
from .pattern import Anything, Number, Var, call, described, either, is_cast, match, uncast
from .sdpa import attention
from .sinks import split_sinks, unshifted, without_sink
from .sites import AttentionSite, LinearSite, Rope, Unknown, common_prefix
from .views import is_view, merges_heads

aten = torch.ops.aten


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
    key_dim = k.projection.rows.shape[1] + (k.shared.rows.shape[1] if k.shared is not None else 0)
    if q.shared is not None or v.shared is not None:
        raise Unknown("Its queries or its values come from two linears, and only keys of two are known.")
    if (k.projection.rows.shape[0], key_dim) != (kv_heads, head_dim) or heads % kv_heads:
        raise Unknown(
            f"It has {heads} query heads of {head_dim}, {k.projection.rows.shape[0]} key heads of "
            f"{key_dim} and {kv_heads} value heads, which do not fit together."
        )
    if v.scale != 1.0 or v.by_token or v.norm is not None or v.rope is not None:
        raise Unknown("Its values are scaled, normalised or rotated, which no known attention does.")
    of_q, of_kv = find_latents(parts.linears, parts.norms, q.projection.linear, k.projection.linear)
    past = k.past, v.past
    if of_kv is not None and of_kv.past is not None:  # the cache holds latents, and what all heads share
        past = of_kv.past, k.past
    if (past[0] is None) != (past[1] is None):
        raise Unknown("Only one of its keys and its values continues a cache.")
    output = _output_linear(core.node, heads * value_dim, parts)
    visibility = read_masks(core.masks, core.is_causal)
    if core.spelling == "varlen":
        visibility = type(visibility)("causal" if core.is_causal else visibility.kind, core.window)
    cross = not (of_q or of_kv) and q.projection.linear.x is not k.projection.linear.x
    return AttentionSite(
        fqn=common_prefix([p.projection.linear.fqn for p in (q, k, v)] + [output.fqn]),
        node=core.node, spelling=core.spelling, q=q.projection, k=k.projection, v=v.projection, o=output,
        q_norm=q.norm, k_norm=k.norm, rope=q.rope, masks=core.masks, visibility=visibility,
        scale=core.scale * q.scale * k.scale, operator_scale=core.scale, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, value_dim=value_dim, softcap=core.softcap, cross=cross, probabilities=core.probabilities,
        past=past if past[0] is not None and past[1] is not None else None, sinks=core.sinks,  # type: ignore[arg-type]
        q_latent=of_q, kv_latent=of_kv, k_shared=k.shared,
    )  # fmt: skip


def _same_rope(one: Rope, other: Rope | None) -> bool:
    return other is not None and all(
        getattr(one, f) == getattr(other, f) for f in ("kind", "cos", "sin", "dim", "start")
    )


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
