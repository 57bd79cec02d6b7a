"""A choice of tokens, halfway through a program, and values picked for them.

A `Frame` is a stretch of the program with one choice of tokens: it knows which tokens of the frame before are left.
`pick` and `put` take tokens out of a labelled value and put them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .axes import BATCH, SEQUENCE, Labels


def pick(t: torch.Tensor, labels: Labels, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` [B, L] of t along its sequence dimension; a batch dimension of 1 grows to B."""
    at, row = labels.index(SEQUENCE), labels.index(BATCH)
    batch = index.shape[0]
    if isinstance(batch, int) and batch == 1:
        return t.index_select(at, index[0])
    if (row, at) == (0, 1) and isinstance(t.shape[0], int) == isinstance(batch, int):
        rows = torch.arange(batch, device=index.device)[:, None]
        return torch.ops.aten.index.Tensor(t.expand(batch, *t.shape[1:]), [rows, index])
    shape: list[Any] = [1] * t.dim()
    shape[row], shape[at] = batch, index.shape[1]
    wide = list(t.shape)
    wide[row] = batch
    picked = list(wide)
    picked[at] = index.shape[1]
    return t.expand(wide).gather(at, index.reshape(shape).expand(picked))


def put(base: torch.Tensor, labels: Labels, index: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`base` with t's tokens at `index` [B, L] of its sequence dimension."""
    at, row = labels.index(SEQUENCE), labels.index(BATCH)
    shape: list[Any] = [1] * t.dim()
    shape[row], shape[at] = index.shape
    return base.scatter(at, index.reshape(shape).expand(t.shape), t)


def along(real: torch.Tensor, labels: Labels) -> torch.Tensor:
    """bool [L] or [B, L] with the dimensions of a labelled value."""
    if real.dim() == 1:
        return real.reshape([-1 if label == SEQUENCE else 1 for label in labels])
    sizes = [1] * len(labels)
    sizes[labels.index(BATCH)], sizes[labels.index(SEQUENCE)] = real.shape  # type: ignore[union-attr]
    return real.reshape(sizes)


@dataclass(eq=False)
class Frame:
    """One choice of tokens, and the values computed for it.

    parent, step: this frame's tokens are `step` int64 [B, L] of the parent's; None for all tokens.
    length: L. offsets: int32, where packed sequences begin and end, or None. real: bool [L] or [B, L], false for
    places that hold a token only to fill up, or None. values: of labelled nodes computed here. fitted:
    values of elsewhere, picked for these tokens. numbered: int64 [B, L], the tokens of the whole sequence whose
    positions these have been given, or None where they keep their own.
    """

    parent: Frame | None
    step: torch.Tensor | None
    length: Any
    values: dict[fx.Node, Any] = field(default_factory=dict)
    fitted: dict[Any, Any] = field(default_factory=dict)
    paths: dict[int, torch.Tensor] = field(default_factory=dict)
    offsets: torch.Tensor | None = None
    real: torch.Tensor | None = None
    numbered: torch.Tensor | None = None

    def positions(self) -> torch.Tensor | None:
        """The tokens of the whole sequence at whose positions this frame's stand, int64 [B, L]; None for all."""
        if self.numbered is not None or self.step is None or self.parent is None:
            return self.numbered
        before = self.parent.positions()
        return self.step if before is None else before.gather(1, self.step)

    def since(self, other: Frame) -> torch.Tensor | None:
        """Which of another, earlier frame's tokens are this one's, int64 [B, L]; None for all."""
        if self is other or self.step is None or self.parent is None:
            return None
        if id(other) not in self.paths:
            before = self.parent.since(other)
            self.paths[id(other)] = self.step if before is None else before.gather(1, self.step)
        return self.paths[id(other)]
