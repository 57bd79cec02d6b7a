"""One rule per operator of PyTorch: where the batch and the sequence are in its result, or why it mixes positions.

A rule is given a node, one of whose arguments is labelled, and gives the labels of its result (of each
result, for several); it raises Stop with half a sentence where tokens would not stay apart.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import argument, sequence_of, value
from thresher.graph.token_labels import (
    Stop,
    TokenAxes,
    attends,
    copied,
    copies,
    first,
    free,
    join,
    only_first,
    pointwise,
    row_by_row,
)

from .labels import aten, rule_of

rule_of(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.softplus.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.expand_as.default,
)(pointwise)
if torch.distributed.is_available():  # sums over ranks, position by position
    rule_of(torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default)(
        pointwise
    )


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


@rule_of(aten.embedding.default)
def _embedding(node: fx.Node, labels: TokenAxes) -> Any:
    if node.args[0] in labels or node.args[1] not in labels:
        raise Stop("looks rows up in the tokens, as in an embedding table")
    return (*labels[node.args[1]], None)  # type: ignore[index]


@rule_of(aten.linear.default, aten.mm.default, aten.matmul.default)
def _linear(node: fx.Node, labels: TokenAxes) -> Any:
    only_first(node, labels)
    if node.target is aten.matmul.default and value(node.args[1]).dim() != 2:
        raise Stop("multiplies by a matrix per row")
    return row_by_row(node, labels)


@rule_of(aten.addmm.default)
def _addmm(node: fx.Node, labels: TokenAxes) -> Any:
    bias, x, weight = node.args[:3]
    if bias in labels or weight in labels or x not in labels:
        raise Stop("combines tokens with tokens")
    free(labels[x][-1], "sums over")  # type: ignore[index]
    return (*labels[x][:-1], None)  # type: ignore[index]


@rule_of(aten.layer_norm.default, aten.rms_norm.default)
def _norm(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = only_first(node, labels)
    for label in of_x[len(of_x) - len(sequence_of(node.args[1])) :]:
        free(label, "normalises over")
    return of_x


@rule_of(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default, aten.glu.default,
       aten.cumprod.default, aten.logcumsumexp.default, aten.argsort.default)  # fmt: skip
def _along(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = only_first(node, labels)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    free(of_x[dim], "works along")  # type: ignore[index]
    return of_x


@rule_of(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
       aten.var.dim, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.argmax.default, aten.any.dim,
       aten.all.dim, aten.logsumexp.default, aten.max.dim, aten.min.dim, aten.argmin.default, aten.prod.dim_int,
       aten.std.correction, aten.std.dim)  # fmt: skip
def _reduce(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = only_first(node, labels)
    at = 2 if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else 1
    given = node.args[at] if len(node.args) > at else node.kwargs.get("dim")
    dims = [given] if isinstance(given, int) else list(sequence_of(given))
    if not dims:
        raise Stop("reduces over every dimension")
    gone = {_dim(d, len(of_x)) for d in dims}
    for d in gone:
        free(of_x[d], "reduces over")
    known = value(node)
    result = known[0] if isinstance(known, (tuple, list)) else known  # max.dim gives values and places
    kept = of_x if result.dim() == len(of_x) else tuple(l for d, l in enumerate(of_x) if d not in gone)
    return kept if result is known else [kept] * len(known)


@rule_of(aten.transpose.int, aten.t.default, aten.permute.default, aten.movedim.int)
def _permute(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = first(node, labels)
    rank = len(of_x)
    if node.target is aten.permute.default:
        return tuple(of_x[d] for d in sequence_of(node.args[1]))
    order = list(range(rank))
    a, b = (0, 1) if node.target is aten.t.default else (_dim(d, rank) for d in node.args[1:3])  # type: ignore[arg-type]
    if node.target is aten.movedim.int:
        order.insert(b, order.pop(a))
    elif rank > 1:
        order[a], order[b] = order[b], order[a]
    return tuple(of_x[d] for d in order)


@rule_of(aten.conv1d.default, aten.convolution.default, aten.conv2d.default)
def _convolution(node: fx.Node, labels: TokenAxes) -> Any:
    raise Stop(
        "convolves over neighbouring positions, and sequences packed in one row would run into each other: it would "
        "need a convolution that stops where a sequence ends"
    )


@rule_of(aten.view_as_complex.default, aten.view_as_real.default)
def _complex(node: fx.Node, labels: TokenAxes) -> Any:
    """Pairs along the last dimension as complex numbers, and back."""
    of_x = first(node, labels)
    if node.target is aten.view_as_real.default:
        return (*of_x, None)
    free(of_x[-1], "pairs")
    return of_x[:-1]


@rule_of(
    aten.slice.Tensor,
    aten.narrow.default,
    aten.flip.default,
    aten.index_select.default,
    aten.constant_pad_nd.default,
)
def _cut(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = only_first(node, labels)
    if node.target is aten.constant_pad_nd.default:
        touched = [-1 - i // 2 for i, amount in enumerate(node.args[1]) if amount != 0]  # type: ignore[arg-type]
    else:
        touched = [node.args[1]] if isinstance(node.args[1], int) else list(sequence_of(node.args[1]))
        if not touched:
            touched = [0]
    for d in touched:
        free(of_x[d], "takes part of")
    return of_x


@rule_of(aten.gather.default, aten.scatter.src, aten.scatter.value)
def _by_places(node: fx.Node, labels: TokenAxes) -> Any:
    """Picks from one dimension, or puts there, each row by itself: which experts a token goes to, and their weights."""
    joined = pointwise(node, labels)
    free(joined[node.args[1]], "picks from")
    return joined


@rule_of(aten.bmm.default)
def _rows_of_each(node: fx.Node, labels: TokenAxes) -> Any:
    """The same rows times each of several stored matrices: [experts, tokens, in] by [experts, in, out]."""
    of_x = only_first(node, labels)
    free(of_x[0], "multiplies by a matrix for each of")
    free(of_x[2], "sums over")
    return of_x


@rule_of(aten.index.Tensor)
def _index(node: fx.Node, labels: TokenAxes) -> Any:
    """Picks from one dimension, by places that the model stores: the heads of a fused projection; or, for each token,
    a row of a table that does not depend on the tokens: an expert's bias."""
    places = sequence_of(node.args[1])
    if (
        node.args[0] not in labels
        and len(places) == 1
        and places[0] in labels
        and value(places[0]).dtype != torch.bool
    ):
        return (*labels[places[0]], *(None,) * (value(node.args[0]).dim() - 1))  # type: ignore[index]
    of_x = only_first(node, labels)
    chosen = [(d, i) for d, i in enumerate(sequence_of(node.args[1])) if i is not None]
    for d, _ in chosen:
        free(of_x[d], "picks from")
    if len(chosen) != 1 or not isinstance(chosen[0][1], fx.Node) or chosen[0][1].op != "get_attr":
        raise Stop("picks positions that are computed in the graph")
    if value(chosen[0][1]).dim() != 1 or value(chosen[0][1]).dtype == torch.bool:
        raise Stop("picks by a mask, or in several dimensions")
    return of_x


@rule_of(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.topk.default,
       aten.sort.default, aten.sort.stable)  # fmt: skip
def _several(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = only_first(node, labels)
    sorts = node.target in (aten.topk.default, aten.sort.default, aten.sort.stable)
    default = -1 if sorts else 0
    at = {aten.topk.default: 2, aten.unbind.int: 1}.get(node.target, 1 if sorts else 2)  # type: ignore[call-overload]
    dim = _dim(node.args[at] if len(node.args) > at else node.kwargs.get("dim", default), len(of_x))  # type: ignore[arg-type]
    free(of_x[dim], "divides")
    each = (
        tuple(label for d, label in enumerate(of_x) if d != dim) if node.target is aten.unbind.int else of_x
    )
    return [each] * len(value(node))


@rule_of(operator.getitem)
def _getitem(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = first(node, labels)
    if not isinstance(of_x, list):
        raise Stop("indexes a tensor")
    return of_x[node.args[1]]  # type: ignore[index]


@rule_of(aten.cat.default, aten.stack.default)
def _cat(node: fx.Node, labels: TokenAxes) -> Any:
    parts = [labels[a] for a in sequence_of(node.args[0]) if a in labels]
    rank = value(node).dim()
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, rank)  # type: ignore[arg-type]
    if node.target is aten.stack.default:
        parts = [(*p[:dim], None, *p[dim:]) for p in parts]
    joined = join(parts, rank)
    free(joined[dim], "concatenates along")
    return joined


@rule_of(aten.expand.default, aten.repeat.default)
def _expand(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = first(node, labels)
    out = (None,) * (value(node).dim() - len(of_x)) + of_x
    if node.target is aten.repeat.default:
        return tuple(_repeated(label, times, 1) for label, times in zip(out, node.args[1]))  # type: ignore[arg-type]
    return out


def _repeated(label: str | None, outer: Any, inner: Any) -> str | None:
    """The label of a dimension whose rows are repeated, all of them in turn (outer) or each on the spot (inner)."""
    times = copied(label)
    if label is None or (outer == 1 and inner == 1):
        return label
    if times is None or not isinstance(outer, int) or not isinstance(inner, int):
        free(label, "repeats")
    assert times is not None
    return copies(times[0] * outer, times[1] * inner)


@rule_of(aten.repeat_interleave.self_int)
def _repeat_each(node: fx.Node, labels: TokenAxes) -> Any:
    """Repeats every entry of one dimension: key heads for their queries, channels of a rotary table."""
    of_x = only_first(node, labels)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if dim is None:
        raise Stop("repeats the flattened values")
    at = _dim(dim, len(of_x))  # type: ignore[arg-type]
    return tuple(_repeated(label, 1, node.args[1]) if d == at else label for d, label in enumerate(of_x))


@rule_of(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node, labels: TokenAxes) -> Any:
    return attends(node.args[:3], argument(node, "attn_mask"), labels)
