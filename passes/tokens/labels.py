"""The table of rules that move labels (`graph.token_labels`) through operators of PyTorch; Thresher's bring theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from thresher import ops
from thresher.graph.nodes import value
from thresher.graph.sizes import example_of
from thresher.graph.token_labels import Stop, TokenRule, pointwise

aten = torch.ops.aten

TOKEN_RULES: dict[Any, TokenRule] = {}
"""By operator, for those that are not defined with `thresher.ops.define`."""


def rule_of(*targets: Any) -> Callable[[TokenRule], TokenRule]:
    """Register the rule of some operators."""

    def add(rule: TokenRule) -> TokenRule:
        TOKEN_RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


def rule_for(node: fx.Node) -> TokenRule:
    """The rule of a node's operator. Raises Stop when there is none."""
    target = node.target
    own = ops.of(target)
    if own is not None and own.tokens is not None:
        return own.tokens
    if (rule := TOKEN_RULES.get(target)) is not None:
        return rule
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return pointwise
    raise Stop("is an operator with no rule for following tokens through it")


def sizes(node: fx.Node) -> list[int]:
    """A node's shape in numbers: the example's."""
    return [example_of(s) for s in value(node).shape]
