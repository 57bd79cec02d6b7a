"""From one group of linears to the next: which nodes run, and what a batch then holds. A plan, without values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...structure.recover import Structure
from .pieces import Piece, reads
from .scores import Scorer
from .sweep import Sweep


@dataclass(frozen=True)
class Step:
    """piece, group: what is quantised when the batches have come here; first: of its piece. scorer: of the tokens.

    nodes: to run, in order. shown: values that the group reads. live: what a batch holds afterwards. advances: whether
    it does; where what is live would be too wide it stays, and `nodes` run once more for the next group.
    """

    piece: Piece
    group: list[Any]  # linears that read one input, or one product by experts
    first: bool
    scorer: Scorer | None
    nodes: list[fx.Node]
    shown: set[fx.Node]
    live: set[fx.Node]
    advances: bool

    @property
    def x(self) -> fx.Node:
        return self.group[0].x


def steps(
    sweep: Sweep,
    structure: Structure,
    pieces: Sequence[Piece],
    scorers: dict[str, Scorer | None],
    known: Collection[fx.Node],
    widest: float,
) -> Iterator[Step]:
    """Every group's step, from batches that hold `known`. widest: features held for a token, in hidden states."""
    order = [(piece, group) for piece in pieces for group in piece.groups]
    if not order:
        return
    hidden = width({structure.layers[0].input} if structure.layers else {order[0][1][0].x})
    held = set(known)
    for index, (piece, group) in enumerate(order):
        first = group is piece.groups[0]
        scorer = scorers[piece.name] if first else None
        own = reads(group)
        shown = {*own, *(scorer.targets if scorer is not None else ())}
        later = [n for _, following in order[index + 1 :] for n in reads(following)]
        nodes = sweep.needed(shown, held)
        # What only the scorer reads comes of weights that are about to change, and is not kept.
        reached = set(sweep.needed(own, held)) | held
        after = sweep.needed(later, reached)
        live = {a for n in after for a in n.all_input_nodes if a in reached and a.op != "get_attr"}
        live |= {t for t in [*own, *later] if t in reached}
        advances = width(live) <= widest * hidden
        yield Step(piece, group, first, scorer, nodes, shown, live, advances)
        if advances:
            held = live


def width(nodes: Collection[fx.Node]) -> int:
    """Features that these nodes hold for each token; what has no token dimensions is not counted."""
    total = 0
    for node in nodes:
        known = node.meta.get("val")
        if isinstance(known, torch.Tensor) and known.is_floating_point() and known.dim() >= 2:
            last = known.shape[-1]
            lead = int(known.shape[1]) if known.dim() == 4 and isinstance(known.shape[1], int) else 1
            total += int(last) * lead if isinstance(last, int) else 0
    return total
