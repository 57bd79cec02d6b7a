"""Labels of dimensions that run over the batch and over the sequence, and what rules that move them are made of.

A rule is given a node, one of whose arguments is labelled, and gives the labels of its result (of each
result, for several); it raises Stop with half a sentence where tokens would not stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value

BATCH, SEQUENCE, TOKENS = "batch", "sequence", "tokens"
"""TOKENS is batch and sequence merged into one dimension, [B, S, ...] viewed as [B*S, ...]."""

Labels = tuple[str | None, ...]


def copies(outer: int, inner: int) -> str:
    """The label of a dimension of outer x tokens x inner rows, in that order: each token several times over, as a
    mixture has it for the experts of each. TOKENS itself for one and one."""
    return TOKENS if outer == inner == 1 else f"{outer}*{TOKENS}*{inner}"


def copied(label: str | None) -> tuple[int, int] | None:
    """(outer, inner) of a label that `copies` gives; None for any other."""
    if label == TOKENS:
        return 1, 1
    parts = (label or "").split("*")
    return (int(parts[0]), int(parts[2])) if len(parts) == 3 else None


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
        """A node's labels, or None where it does not depend on the tokens or cannot be followed."""
        return self.labels.get(node)


TokenRule = Callable[[fx.Node, TokenAxes], Any]


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


def free(label: str | None, does: str) -> None:
    """Raise Stop where a dimension that is worked along holds the tokens. does: such as "sums over"."""
    if label is not None:
        raise Stop(f"{does} the {label} dimension")


def first(node: fx.Node, labels: TokenAxes) -> Labels:
    """The labels of the first argument. Raises Stop where tokens come in elsewhere."""
    if node.args[0] not in labels:
        raise Stop("takes the tokens anywhere but as its first argument")
    return labels[node.args[0]]  # type: ignore[index]


def only_first(node: fx.Node, labels: TokenAxes) -> Labels:
    """The labels of the first argument. Raises Stop where any other depends on the tokens too."""
    if any(a in labels for a in node.all_input_nodes if a is not node.args[0]):
        raise Stop("combines tokens with tokens")
    return first(node, labels)


def pointwise(node: fx.Node, labels: TokenAxes) -> Any:
    """The rule of whatever treats every element alike."""
    if not isinstance(value(node), torch.Tensor):
        raise Stop("does not give one tensor")
    return join([labels[a] for a in node.all_input_nodes if a in labels], value(node).dim())


def row_by_row(node: fx.Node, labels: TokenAxes) -> Labels:
    """The rule of what turns each vector along the last dimension of its first argument into another vector."""
    of_x = only_first(node, labels)
    free(of_x[-1], "sums over")
    return (*of_x[:-1], None)


def attends(operands: Sequence[Any], mask: Any, labels: TokenAxes) -> Labels:
    """The labels of an attention over queries, keys and values, [batch, heads, sequence, head_dim] each."""
    expected = (BATCH, None, SEQUENCE, None)
    for argument in operands:
        if labels.get(argument) != expected:
            seen = labels.get(argument)
            said = (
                f"over {seen}, not over [batch, heads, sequence, head_dim]"
                if seen
                else "for, or over, other tokens"
            )
            raise Stop(f"attends {said}")
    if mask in labels:
        raise Stop("takes a mask that depends on the tokens")
    return expected
