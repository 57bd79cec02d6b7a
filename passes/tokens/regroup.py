"""Where the tokens are after a reshape: dimensions that are merged and taken apart, by their sizes, come and go."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import fx

from thresher.graph.nodes import value
from thresher.graph.token_labels import (
    BATCH,
    SEQUENCE,
    TOKENS,
    Labels,
    Stop,
    TokenAxes,
    copied,
    copies,
    first,
    free,
)

from .labels import aten, rule_of, sizes


@rule_of(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
def _reshape(node: fx.Node, labels: TokenAxes) -> Any:
    return regroup(first(node, labels), sizes(node.args[0]), sizes(node), labels)  # type: ignore[arg-type]


@rule_of(aten.view_as.default, aten.reshape_as.default)
def _like(node: fx.Node, labels: TokenAxes) -> Any:
    if node.args[1] not in labels:
        raise Stop("takes the shape of other values than tokens")
    return _reshape(node, labels)


@rule_of(aten.unsqueeze.default)
def _unsqueeze(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = list(first(node, labels))
    at: Any = node.args[1]
    dim = at % (len(of_x) + 1)
    if dim == 0 and of_x[:1] == [TOKENS] and labels.batch == 1 and isinstance(value(node).shape[1], int):
        return (BATCH, SEQUENCE, *of_x[1:])  # sizes that no call changes: there is one row
    of_x.insert(dim, None)
    return tuple(of_x)


@rule_of(aten.squeeze.dim, aten.squeeze.dims, aten.select.int)
def _drop(node: fx.Node, labels: TokenAxes) -> Any:
    of_x = first(node, labels)
    given: Any = node.args[1]
    gone = {d % len(of_x) for d in (given if isinstance(given, (list, tuple)) else [given])}
    if node.target is not aten.select.int:
        gone = {d for d in gone if sizes(node.args[0])[d] == 1}  # type: ignore[arg-type]
        if 0 in gone and of_x[:2] == (BATCH, SEQUENCE):
            return (TOKENS, *(label for d, label in enumerate(of_x) if d > 1 and d not in gone))
    for d in gone:
        free(of_x[d], "picks from")
    return tuple(label for d, label in enumerate(of_x) if d not in gone)


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
    """Labels of the columns that these rows become, in memory's order; both have as many elements."""
    rows = (
        [r for r in rows if r[0] is not None or r[1] != 1]
        if len(rows) > 1 or rows[:1] == [(None, 1)]
        else rows
    )
    named = [label for label, _ in rows if label is not None]
    kept = [d for d, size in enumerate(columns) if size != 1]
    if len(named) == 1 and not kept and len(rows) == len(columns) == 1:
        return list(named)  # one row only: its dimension of size 1 stays itself
    if named == [TOKENS] and len(rows) == 1 and columns == [axes.batch, axes.sequence]:
        return [BATCH, SEQUENCE]  # of one row, too, whose dimension of size 1 is the batch
    if not named:
        given: list[str | None] = []
    elif len(rows) == len(kept) == 1 or (
        [label for label, _ in rows] == [BATCH, SEQUENCE]
        and [columns[d] for d in kept] == [axes.batch, axes.sequence]
    ):
        given = list(named)
    else:
        given = _split(_merged(rows, named), [columns[d] for d in kept], axes, named)
    places = dict(zip(kept, given))
    return [places.get(d) for d in range(len(columns))]


def _merged(rows: list[tuple[str | None, int]], named: list[str]) -> tuple[int, int]:
    """(outer, inner): how often, before and behind the tokens, these rows have each token."""
    first = next(i for i, (label, _) in enumerate(rows) if label is not None)
    times = copied(named[0])
    if named == [BATCH, SEQUENCE] and rows[first + 1 : first + 2] and rows[first + 1][0] == SEQUENCE:
        times, behind = (1, 1), rows[first + 2 :]
    else:
        behind = rows[first + 1 :]
    if times is None or len(named) > (2 if named[0] == BATCH else 1):
        raise Stop(f"merges or splits the {' and '.join(named)} dimension with others")
    return times[0] * prod(size for _, size in rows[:first]), times[1] * prod(size for _, size in behind)


def _split(times: tuple[int, int], columns: list[int], axes: TokenAxes, named: list[str]) -> list[str | None]:
    """Labels of columns into which outer x tokens x inner rows are taken apart."""
    outer, inner = times
    given: list[str | None] = []
    left, at = outer, 0
    while at < len(columns) and left > 1 and left % columns[at] == 0:
        left //= columns[at]
        given.append(None)
        at += 1
    tokens, rest = axes.batch * axes.sequence, columns[at + 1 :]
    if left == 1 and columns[at : at + 2] == [axes.batch, axes.sequence] and prod(columns[at + 2 :]) == inner:
        return [*given, BATCH, SEQUENCE, *[None] * len(columns[at + 2 :])]
    size = columns[at] if at < len(columns) else 0
    behind, odd = divmod(size, left * tokens) if size else (0, 1)
    if odd or behind * prod(rest) != inner:
        raise Stop(f"merges or splits the {' and '.join(named)} dimension with others")
    return [*given, copies(left, behind), *[None] * len(rest)]
