"""Labels of dimensions that run over the batch and over the sequence, and the table of rules that move them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.sizes import example_of

aten = torch.ops.aten

BATCH, SEQUENCE, TOKENS = "batch", "sequence", "tokens"
"""TOKENS is batch and sequence merged into one dimension, [B, S, ...] viewed as [B*S, ...]."""

Labels = tuple[str | None, ...]


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


def sizes(node: fx.Node) -> list[int]:
    return [example_of(s) for s in value(node).shape]


def rule_for(node: fx.Node) -> Rule:
    """The rule of a node's operator. Raises Stop when there is none."""
    target = node.target
    if (rule := RULES.get(target) or RULES.get(str(target))) is not None:
        return rule
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return pointwise
    raise Stop("is an operator with no rule for following tokens through it")


Rule = Callable[[fx.Node, TokenAxes], Any]
RULES: dict[Any, Rule] = {}  # by operator; by name for those of Thresher's own, which are made later


def rule_of(*targets: Any) -> Callable[[Rule], Rule]:
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


def pointwise(node: fx.Node, labels: TokenAxes) -> Any:
    """The rule of whatever treats every element alike."""
    if not isinstance(value(node), torch.Tensor):
        raise Stop("does not give one tensor")
    return join([labels[a] for a in node.all_input_nodes if a in labels], value(node).dim())


def attends(operands: Sequence[Any], mask: Any, labels: TokenAxes) -> Labels:
    expected = (BATCH, None, SEQUENCE, None)
    for argument in operands:
        if labels.get(argument) != expected:
            raise Stop(f"attends over {labels.get(argument)}, not over [batch, heads, sequence, head_dim]")
    if mask in labels:
        raise Stop("takes a mask that depends on the tokens")
    return expected
