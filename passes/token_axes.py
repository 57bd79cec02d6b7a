"""Which dimensions of each value run over the batch and over the sequence.

Starting from the token inputs, labels follow the data through the graph, one rule per operator. A
labelled operator treats every token alike, so the same node computes the same thing for tokens laid
out in any other way; one that mixes positions stops the flow, and so does everything after it. The
labels come from the data flow alone: neither equal sizes nor equal symbols mean anything, so a
graph captured at fixed sizes is labelled as well as a dynamic one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import fx

from thresher.program import Program, sequence_of, value

aten = torch.ops.aten

BATCH, SEQUENCE, TOKENS = "batch", "sequence", "tokens"
"""TOKENS is batch and sequence merged into one dimension, [B, S, ...] viewed as [B*S, ...]."""

Labels = tuple[str | None, ...]


class Composite(Protocol):
    """An attention spelled out in several nodes."""

    @property
    def q(self) -> fx.Node: ...
    @property
    def k(self) -> fx.Node: ...
    @property
    def v(self) -> fx.Node: ...
    @property
    def mask(self) -> fx.Node | None: ...
    @property
    def inside(self) -> frozenset[fx.Node]: ...


class Stop(Exception):
    """The node mixes positions or cannot be followed; the text is half a sentence: `sums over the sequence`."""


@dataclass
class TokenAxes:
    """Labels of each value that depends on the tokens, and why the others are not labelled.

    batch, sequence: their sizes in the example the graph was captured with.
    labels: node -> its labels; for a node with several results, a list with one entry each.
    stopped: node -> why it does not treat tokens alike, for the first such nodes and all they feed.
    """

    batch: int
    sequence: int
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    stopped: dict[fx.Node, str] = field(default_factory=dict)

    def __contains__(self, node: object) -> bool:
        return node in self.labels

    def __getitem__(self, node: Any) -> Any:
        return self.labels[node]

    def get(self, node: Any) -> Any:
        return self.labels.get(node)


def hint(size: Any) -> int:
    """A size as a number; a symbolic one gives its example value."""
    return size if isinstance(size, int) else int(size.node.hint)


def sizes(node: fx.Node) -> list[int]:
    return [hint(s) for s in value(node).shape]


def propagate(
    program: Program, seeds: Mapping[fx.Node, Labels], composites: Mapping[fx.Node, Composite] | None = None
) -> TokenAxes:
    """Follow the labels of `seeds` through the program; each seed has a batch and a sequence dimension.

    composites: attentions spelled out in several nodes, by the node that holds the result; what is inside
    them gets no labels and stops nothing.
    """
    composites = composites or {}
    inside = {n for c in composites.values() for n in c.inside}
    seed, labels = next(iter(seeds.items()))
    extent = dict(zip(labels, sizes(seed)))
    axes = TokenAxes(extent[BATCH], extent[SEQUENCE], labels=dict(seeds))
    for node in program.nodes():
        if node in inside:
            continue
        if node in composites and composites[node].inside:
            _composite(node, composites[node], axes)
            continue
        sources = [a for a in node.all_input_nodes if a in axes.labels]
        held_up = next((a for a in node.all_input_nodes if a in axes.stopped), None)
        if held_up is not None:
            axes.stopped[node] = axes.stopped[held_up]
        elif sources and node.target is not aten.sym_size.int:
            try:
                axes.labels[node] = rule_for(node)(node, axes)
            except Stop as stop:
                axes.stopped[node] = f"{node.name} ({node.target}) {stop}"
    return axes


def _composite(node: fx.Node, site: Composite, axes: TokenAxes) -> None:
    held_up = next((a for a in (site.q, site.k, site.v) if a in axes.stopped), None)
    if held_up is not None:
        axes.stopped[node] = axes.stopped[held_up]
    elif site.q in axes:
        try:
            axes.labels[node] = _attends((site.q, site.k, site.v), site.mask, axes)
        except Stop as stop:
            axes.stopped[node] = f"{node.name} (attention) {stop}"


def rule_for(node: fx.Node) -> Rule:
    target = node.target
    if target in RULES:
        return RULES[target]
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _pointwise
    raise Stop("is an operator with no rule for following tokens through it")


Rule = Callable[[fx.Node, TokenAxes], Any]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


def join(labels: Sequence[Labels], rank: int) -> Labels:
    """Labels of a broadcast result, right-aligned."""
    joined: list[str | None] = [None] * rank
    for one in labels:
        for offset, label in enumerate(reversed(one), start=1):
            if label is None:
                continue
            if joined[-offset] not in (None, label):
                raise Stop(f"lines up a {label} dimension with a {joined[-offset]} dimension")
            joined[-offset] = label
    return tuple(joined)


def _dim(node: fx.Node, dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _free(label: str | None, does: str) -> None:
    if label is not None:
        raise Stop(f"{does} the {label} dimension")


def _first(node: fx.Node, labels: TokenAxes) -> Labels:
    if node.args[0] not in labels:
        raise Stop("takes the tokens anywhere but as its first argument")
    return labels[node.args[0]]  # type: ignore[index]


def _only_first(node: fx.Node, labels: TokenAxes) -> Labels:
    if any(a in labels for a in node.all_input_nodes if a is not node.args[0]):
        raise Stop("combines tokens with tokens")
    return _first(node, labels)


@_rule(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.contiguous.default,
       aten.clone.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
       aten.softplus.default, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor)  # fmt: skip
def _pointwise(node: fx.Node, labels: TokenAxes) -> Any:
    if not isinstance(value(node), torch.Tensor):
        raise Stop("does not give one tensor")
    return join([labels[a] for a in node.all_input_nodes if a in labels], value(node).dim())


@_rule(aten.embedding.default)
def _embedding(node: fx.Node, labels: TokenAxes) -> Any:
    if node.args[0] in labels or node.args[1] not in labels:
        raise Stop("uses the tokens as the table")
    return (*labels[node.args[1]], None)  # type: ignore[index]


@_rule(aten.linear.default, aten.mm.default, aten.matmul.default)
def _linear(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _only_first(node, labels)
    if (
        isinstance(node.args[1], fx.Node)
        and node.target is aten.matmul.default
        and value(node.args[1]).dim() != 2
    ):
        raise Stop("multiplies by a matrix per row")
    _free(of_x[-1], "sums over")
    return (*of_x[:-1], None)


@_rule(aten.addmm.default)
def _addmm(node: fx.Node, labels: TokenAxes) -> Any:
    bias, x, weight = node.args[:3]
    if bias in labels or weight in labels or x not in labels:
        raise Stop("combines tokens with tokens")
    _free(labels[x][-1], "sums over")  # type: ignore[index]
    return (*labels[x][:-1], None)  # type: ignore[index]


@_rule(aten.layer_norm.default, aten.rms_norm.default)
def _norm(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _only_first(node, labels)
    for label in of_x[len(of_x) - len(sequence_of(node.args[1])) :]:
        _free(label, "normalises over")
    return of_x


@_rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default, aten.glu.default)
def _along(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _only_first(node, labels)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    _free(of_x[dim], "works along")  # type: ignore[index]
    return of_x


@_rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
       aten.var.dim, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.argmax.default, aten.any.dim,
       aten.all.dim, aten.logsumexp.default)  # fmt: skip
def _reduce(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _only_first(node, labels)
    at = 2 if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else 1
    given = node.args[at] if len(node.args) > at else node.kwargs.get("dim")
    dims = [given] if isinstance(given, int) else list(sequence_of(given))
    if not dims:
        raise Stop("reduces over every dimension")
    gone = {_dim(node, d, len(of_x)) for d in dims}
    for d in gone:
        _free(of_x[d], "reduces over")
    if value(node).dim() == len(of_x):
        return of_x
    return tuple(label for d, label in enumerate(of_x) if d not in gone)


@_rule(aten.transpose.int, aten.t.default, aten.permute.default, aten.movedim.int)
def _permute(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _first(node, labels)
    rank = len(of_x)
    if node.target is aten.permute.default:
        return tuple(of_x[d] for d in sequence_of(node.args[1]))
    order = list(range(rank))
    a, b = (0, 1) if node.target is aten.t.default else (_dim(node, d, rank) for d in node.args[1:3])  # type: ignore[arg-type]
    if node.target is aten.movedim.int:
        order.insert(b, order.pop(a))
    elif rank > 1:
        order[a], order[b] = order[b], order[a]
    return tuple(of_x[d] for d in order)


@_rule(aten.unsqueeze.default)
def _unsqueeze(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = list(_first(node, labels))
    of_x.insert(_dim(node, node.args[1], len(of_x) + 1), None)  # type: ignore[arg-type]
    return tuple(of_x)


@_rule(aten.squeeze.dim, aten.squeeze.dims, aten.select.int)
def _drop(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _first(node, labels)
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    gone = {_dim(node, d, len(of_x)) for d in dims}  # type: ignore[arg-type]
    if node.target is not aten.select.int:
        gone = {d for d in gone if sizes(node.args[0])[d] == 1}  # type: ignore[arg-type]
    for d in gone:
        _free(of_x[d], "picks from")
    return tuple(label for d, label in enumerate(of_x) if d not in gone)


@_rule(
    aten.slice.Tensor,
    aten.narrow.default,
    aten.flip.default,
    aten.index_select.default,
    aten.constant_pad_nd.default,
)
def _cut(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _only_first(node, labels)
    if node.target is aten.constant_pad_nd.default:
        touched = [-1 - i // 2 for i, amount in enumerate(node.args[1]) if amount != 0]  # type: ignore[arg-type]
    else:
        touched = [node.args[1]] if isinstance(node.args[1], int) else list(sequence_of(node.args[1]))
        if not touched:
            touched = [0]
    for d in touched:
        _free(of_x[d], "takes part of")
    return of_x


@_rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.topk.default,
       aten.sort.default)  # fmt: skip
def _several(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _only_first(node, labels)
    default, at = (-1, 2 if node.target is aten.topk.default else 1) if node.target in (
        aten.topk.default, aten.sort.default) else (0, 1 if node.target is aten.unbind.int else 2)  # fmt: skip
    dim = _dim(node, node.args[at] if len(node.args) > at else node.kwargs.get("dim", default), len(of_x))  # type: ignore[arg-type]
    _free(of_x[dim], "divides")
    each = (
        tuple(label for d, label in enumerate(of_x) if d != dim) if node.target is aten.unbind.int else of_x
    )
    return [each] * len(value(node))


@_rule(operator.getitem)
def _getitem(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _first(node, labels)
    if not isinstance(of_x, list):
        raise Stop("indexes a tensor")
    return of_x[node.args[1]]  # type: ignore[index]


@_rule(aten.cat.default, aten.stack.default)
def _cat(node: fx.Node, labels: TokenAxes) -> Any:
    parts = [labels[a] for a in sequence_of(node.args[0]) if a in labels]
    rank = value(node).dim()
    dim = _dim(node, node.args[1] if len(node.args) > 1 else 0, rank)  # type: ignore[arg-type]
    if node.target is aten.stack.default:
        parts = [(*p[:dim], None, *p[dim:]) for p in parts]
    joined = join(parts, rank)
    _free(joined[dim], "concatenates along")
    return joined


@_rule(aten.expand.default, aten.repeat.default)
def _expand(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = _first(node, labels)
    out = (None,) * (value(node).dim() - len(of_x)) + of_x
    if node.target is aten.repeat.default:
        for label, times in zip(out, node.args[1]):  # type: ignore[arg-type]
            if times != 1:
                _free(label, "repeats")
    return out


@_rule(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
def _reshape(node: fx.Node, labels: TokenAxes) -> Any:
    return regroup(_first(node, labels), sizes(node.args[0]), sizes(node), labels)  # type: ignore[arg-type]


def regroup(of_x: Labels, before: Sequence[int], after: Sequence[int], axes: TokenAxes) -> Labels:
    """Labels after a reshape: dimensions are matched in the smallest groups of equal product, left to right."""
    result: list[str | None] = []
    i = j = 0
    while i < len(before) or j < len(after):
        rows, columns = list(range(i, min(i + 1, len(before)))), list(range(j, min(j + 1, len(after))))
        while (left := prod(before[d] for d in rows)) != (right := prod(after[d] for d in columns)):
            if left < right:
                rows.append(i + len(rows))
            else:
                columns.append(j + len(columns))
        result += _regroup_one([(of_x[d], before[d]) for d in rows], [after[d] for d in columns], axes)
        i, j = i + len(rows), j + len(columns)
    return tuple(result)


def _regroup_one(rows: list[tuple[str | None, int]], columns: list[int], axes: TokenAxes) -> list[str | None]:
    named = [label for label, _ in rows if label is not None]
    wide = sum(label is not None or size != 1 for label, size in rows)
    kept = [d for d, size in enumerate(columns) if size != 1]
    if len(named) == 1 and not kept and len(rows) == len(columns) == 1:
        return list(named)  # one row only: its dimension of size 1 stays itself
    if not named:
        given: list[str] = []
    elif wide == 1 and len(kept) == 1:
        given = named
    elif named == [TOKENS] and wide == 1 and [columns[d] for d in kept] == [axes.batch, axes.sequence]:
        given = [BATCH, SEQUENCE]
    elif named == [BATCH, SEQUENCE] and wide == 2 and len(kept) == 1:
        given = [TOKENS]
    elif (
        named == [BATCH, SEQUENCE] and wide == 2 and [columns[d] for d in kept] == [axes.batch, axes.sequence]
    ):
        given = named
    else:
        raise Stop(f"merges or splits the {' and '.join(named)} dimension with others")
    places = dict(zip(kept, given))
    return [places.get(d) for d in range(len(columns))]


@_rule(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node, labels: TokenAxes) -> Any:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return _attends(node.args[:3], mask, labels)


def _attends(operands: Sequence[Any], mask: Any, labels: TokenAxes) -> Labels:
    expected = (BATCH, None, SEQUENCE, None)
    for argument in operands:
        if labels.get(argument) != expected:
            raise Stop(f"attends over {labels.get(argument)}, not over [batch, heads, sequence, head_dim]")
    if mask in labels:
        raise Stop("takes a mask that depends on the tokens")
    return expected
