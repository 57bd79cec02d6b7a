"""What products by experts share: their arguments' check, and rows brought together expert by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from thresher.errors import ArgumentError
from thresher.graph.token_labels import Labels, Stop, TokenAxes, free, join

from .. import arguments

MEMORY = "It gathers the matrices of each row's expert: memory grows with rows times a matrix, which a few tokens afford."


def check_rows(x: torch.Tensor) -> None:
    """Raise ArgumentError unless x is of floating-point rows [..., K]."""
    if not x.is_floating_point() or x.dim() < 1:
        raise ArgumentError("x", arguments.given(x), "floating [..., in_features]", "Convert it first.")


def check_experts(x: torch.Tensor, experts: torch.Tensor, count: int) -> None:
    """Raise ArgumentError unless `experts` names one of `count` matrices for each row of x [..., K]."""
    check_rows(x)
    lead = tuple(x.shape[:-1])
    fits = experts.dim() <= len(lead) and all(
        (isinstance(e, int) and e == 1) or e == n for e, n in zip(experts.shape[::-1], lead[::-1])
    )
    if experts.dtype not in arguments.INTEGERS or not fits:
        raise ArgumentError("experts", arguments.given(experts), f"int32 or int64, to be expanded to {lead}",
                            "Give each row the number of its matrix.")  # fmt: skip
    arguments.in_range("experts", experts, 0, count - 1, "Number the matrices from 0.")


def groups(x: torch.Tensor, experts: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, int64 places of its rows) for each expert that has rows; rows are x [..., K] without its last dimension."""
    which = experts.expand(x.shape[:-1]).reshape(-1)
    order = which.argsort(stable=True)
    start = 0
    for expert, rows in enumerate(torch.bincount(which, minlength=count).tolist()):
        if rows:
            yield expert, order[start : start + rows]
        start += rows


def by_expert(
    x: torch.Tensor, experts: torch.Tensor, count: int, outputs: int, product: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:  # fmt: skip
    """[..., outputs] of x [..., K]: `product(expert, rows [n, K])` gives [n, outputs] for the rows of one expert."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], outputs)
    if rows.shape[0] == 1 and experts.numel() == 1:
        return product(int(experts), rows).reshape(*x.shape[:-1], outputs)
    for expert, places in groups(x, experts, count):
        out.index_copy_(0, places, product(expert, rows.index_select(0, places)))
    return out.reshape(*x.shape[:-1], outputs)


def each_row(node, labels: TokenAxes) -> Labels:
    """The token rule: every row is multiplied alone, by the matrix that its own number names."""
    x, experts = node.args[0], node.kwargs.get("experts")
    if experts is None:
        place = [a.name for a in node.target._schema.arguments].index("experts")
        experts = node.args[place]
    if any(a in labels for a in node.all_input_nodes if a is not x and a is not experts):
        raise Stop("combines tokens with tokens")
    rank = node.meta["val"].dim()
    found = []
    if x in labels:
        free(labels[x][-1], "sums over")
        found.append((*labels[x][:-1], None))
    if experts in labels:
        found.append((*labels[experts], None))
    return join(found, rank)
