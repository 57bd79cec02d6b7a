"""How a caller's padded tensors become a packed program's inputs, and its results padded ones again.

The prepacking pass writes this description; the runtime carries it out around the compiled body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Gather:
    """A packed input: the real tokens of a padded tensor.

    origin: "input" or "prologue". index: which one. batch, sequence: its dimensions that run over rows
    and positions; `batch` is None when the tensor is the same for every row.
    The result keeps every dimension, with size 1 for the batch and T for the sequence.
    """

    origin: str
    index: int
    batch: int | None
    sequence: int | None


@dataclass(frozen=True)
class PlanField:
    """A packed input that comes from the packing plan: `cu_seqlens`, `max_len`, `rows`, `columns`, or
    `segments` when sequences share rows."""

    name: str


@dataclass(frozen=True)
class Counted:
    """A packed input that is a number, worked out for each call before it starts, so that the body waits for no device.

    of: `(lengths, inputs) -> int`, from the number of tokens of each packed sequence, filler last, and the caller's
        inputs.
    """

    of: Callable[[Sequence[int], Sequence[Any]], int]


@dataclass(frozen=True)
class Scatter:
    """A padded result: output `index` of the body, unpacked along its batch and sequence dimensions."""

    index: int
    batch: int
    sequence: int


@dataclass(frozen=True)
class Passed:
    """A value handed on as it is. origin: "input", "prologue", "body" or "epilogue"."""

    origin: str
    index: int


@dataclass(frozen=True)
class Visibility:
    """Which keys a real query sees, for one attention mask of the model.

    kind: "bidirectional", "causal", or "generic" (whatever the mask says; it is passed to the operator).
    window: how many earlier (and, bidirectionally, later) positions are visible; -1 for all.
    """

    kind: str
    window: int = -1


@dataclass(frozen=True)
class Packing:
    """How a packed program wants its calls packed, and when.

    form: "flat", one row of T tokens cut into segments; or "rows", sequences sharing rows of a fixed capacity.
    buckets: at most this many values of T, filled up with tokens that are dropped; 0 for T as it is.
    limit: the largest T the buckets reach in even steps.
    outputs: "padded", or "packed": results with a value per token come back as [1, T, ...].
    min_gain: calls whose predicted gain is lower run padded.
    token_cost: FLOPs of the linears a token. pair_cost: FLOPs of attention per query and key, all layers.
    causal: a query sees half of the keys. capacity: of a row in form "rows"; 0 for what costs least.
    """

    form: str = "flat"
    buckets: int = 0
    limit: int = 0
    outputs: str = "padded"
    min_gain: float = 0.0
    token_cost: float = 1.0
    pair_cost: float = 0.0
    causal: bool = False
    capacity: int = 0

    def gain(self, lengths: Sequence[int], width: int) -> float:
        """FLOPs of the padded batch over those of its real tokens; padded attention computes every pair."""
        tokens, pairs = sum(lengths), sum(n * n for n in lengths)
        padded = len(lengths) * width * (self.token_cost + self.pair_cost * width)
        packed = tokens * self.token_cost + self.pair_cost * pairs / (2 if self.causal else 1)
        return padded / packed if packed else 1.0


@dataclass
class PackedLayout:
    """Everything the runtime needs beside the body, which is the Program that holds this.

    mask: index of the caller's input that marks real tokens. tokens: index of the [B, S, ...] token input.
    prologue: computes, padded, what the body needs and does not depend on the tokens; None when nothing is.
    arguments: where each of the body's placeholders comes from.
    epilogue: what follows the first operator that mixes positions; None when nothing does.
    epilogue_arguments: where each of the epilogue's placeholders comes from.
    results: where each of the caller's results comes from.
    extras: where results beyond the caller's come from (`CallPlan.extra_outputs`); calls that run padded have none.
    padded: the program before packing, for the calls that cannot be packed.
    rewritten: other passes changed the body after it was packed, so that `padded` lacks what they did. Then every
        call runs packed that can, also where packing itself gains nothing.
    holes: rows with pads between real tokens may be packed.
    visibilities: what was found for each mask, by the attention site that uses it.
    masks: prologue outputs that are masks of generic attention; a call in which one of them lets a real
        query see a pad key is run padded.
    reclassify: `(rows, columns) -> visibilities`, by evaluating the mask at that size. A window wider than the
        sizes seen so far shows only there.
    proven: longest sequence for which `visibilities` was checked.
    packing: how calls are packed, and when.
    """

    mask: int
    tokens: int
    prologue: Program | None
    arguments: list[Gather | PlanField | Passed | Counted]
    epilogue: Program | None
    epilogue_arguments: list[Scatter | Passed]
    results: list[Scatter | Passed]
    padded: Program
    visibilities: dict[str, Visibility] = field(default_factory=dict)
    masks: tuple[int, ...] = ()
    reclassify: Callable[[int], dict[str, Visibility]] | None = None
    proven: int = 0
    packing: Packing = Packing()
    extras: tuple[Scatter | Passed, ...] = ()
    rewritten: bool = False
    holes: bool = True

    @property
    def mask_name(self) -> str:
        """What the caller calls the input that marks real tokens."""
        return self.padded.input_names[self.mask]

    @property
    def reads_ends(self) -> list[int]:
        """Which of the first (0) and the last (-1) column of the padded batch what follows the packed body picks, as
        poolers do."""
        if self.epilogue is None:
            return []
        users = [
            (user, source.sequence)
            for place, source in zip(self.epilogue.placeholders, self.epilogue_arguments)
            if isinstance(source, Scatter)
            for user in place.users
        ]
        return [end for end in (0, -1) if any(_picks(end, user, dim) for user, dim in users)]

    def windowed(self) -> bool:
        """Whether some attention counts distances, which holes in a row would falsify."""
        return any(v.window >= 0 for v in self.visibilities.values())


def _picks(end: int, node: fx.Node, dim: int) -> bool:
    """Whether a node takes place 0 or -1 of a dimension."""
    if node.target is aten.select.int:
        return tuple(node.args[1:3]) == (dim, end)
    if node.target is not aten.slice.Tensor or tuple(node.args[1:3]) != (dim, end):
        return False
    stop = node.args[3] if len(node.args) > 3 else None
    return bool(stop == 1) if end == 0 else stop is None or (isinstance(stop, int) and stop >= 1 << 31)
