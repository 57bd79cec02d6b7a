"""Attention sinks: a stored score of each head that is put beside the keys' scores and has no value (GPT-OSS).

logits = cat([scores, sinks.reshape(1, -1, 1, 1).expand(...)], -1)
probabilities = softmax(logits - logits.max(-1, keepdim=True))[..., :-1]
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import sequence_of, value
from thresher.graph.sizes import same_size

from .pattern import uncast

aten = torch.ops.aten


def unshifted(logits: Any) -> Any:
    """Logits before each query's largest was taken from them, which no softmax sees."""
    if not isinstance(logits, fx.Node) or logits.target is not aten.sub.Tensor or logits.kwargs:
        return logits
    whole, peak = logits.args
    if isinstance(peak, fx.Node) and peak.target is operator.getitem and peak.args[1] == 0:
        peak = peak.args[0]
    if not isinstance(peak, fx.Node) or peak.target not in (aten.max.dim, aten.amax.default):
        return logits
    x, dim, *kept = (*peak.args, *peak.kwargs.values())
    last = list(sequence_of(dim)) or [dim]
    rank = value(whole).dim()
    return uncast(whole) if x is whole and last in ([-1], [rank - 1]) and kept == [True] else logits


def split_sinks(logits: Any) -> tuple[Any, fx.Node | None]:
    """The scores of keys, and the stored sinks [heads] behind them; None where there are none."""
    if not isinstance(logits, fx.Node) or logits.target is not aten.cat.default:
        return logits, None
    parts = sequence_of(logits.args[0])
    rank = value(logits).dim()
    if len(parts) != 2 or rank != 4 or (*logits.args[1:], *logits.kwargs.values()) not in ((-1,), (3,)):
        return logits, None
    scores, column = parts
    if not same_size(value(column).shape[3], 1):
        return logits, None
    sinks: Any = uncast(column)
    if isinstance(sinks, fx.Node) and sinks.target is aten.expand.default:
        sinks = uncast(sinks.args[0])
    if isinstance(sinks, fx.Node) and sinks.target is aten.reshape.default and _one_a_head(value(sinks)):
        sinks = uncast(sinks.args[0])
    heads = value(scores).shape[1]
    stored = isinstance(sinks, fx.Node) and sinks.op == "get_attr" and value(sinks).dim() == 1
    if not stored or not same_size(value(sinks).shape[0], heads):
        return logits, None
    return uncast(scores), sinks


def _one_a_head(column: torch.Tensor) -> bool:
    """Whether a tensor is [1, heads, 1, 1]."""
    return column.dim() == 4 and all(same_size(column.shape[d], 1) for d in (0, 2, 3))


def without_sink(softmax: fx.Node) -> fx.Node | None:
    """The probabilities of keys: all but the last column, where the softmax, or a cast of it, is cut so; else None."""
    node = softmax
    while True:
        readers = [u for u in node.users if u.op != "output"]
        if len(readers) != 1:
            return None
        node = readers[0]
        if node.target is aten.slice.Tensor and node.args[1] in (-1, 3) and node.args[2:] == (0, -1):
            return node
        if uncast(node) is node:
            return None
