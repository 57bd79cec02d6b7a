"""Which tokens attend: one layer's choice, and what all choices of a stretch of layers start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..tokens.segments import Segments
from .stretches import Stretch


@dataclass
class Chosen:
    """One layer's choice.

    index: int64 [B, L]; places not used hold -1 where rows are padded. at: the same, with tokens of no
    consequence in such places. to: where results go, a spare row behind the last for those; None where all are
    used. scores: [B, n]. held: [B], or [sequences] of a packed row. offsets: of the packed sequences, else None.
    origin: int64 [B, n], the stretch's tokens in the whole prompt; None for all of it.
    """

    index: torch.Tensor
    at: torch.Tensor
    to: torch.Tensor | None
    scores: torch.Tensor
    held: torch.Tensor
    offsets: torch.Tensor | None = None
    origin: torch.Tensor | None = None

    def in_prompt(self) -> torch.Tensor:
        """The chosen tokens' places in the whole prompt, int64 [B, L]; -1 for places not used."""
        if self.origin is None:
            return self.index
        found = self.origin.gather(1, self.at)
        return found if self.to is None else found.masked_fill(self.index < 0, -1)


class Tokens:
    """What every layer's choice in a stretch has in common: padding, protection, probe rows.

    plan: the `zipvl.ZipPlan`. env: values by node. before: of the stretch before.
    """

    def __init__(
        self, plan: Any, config: Any, stretch: Stretch, env: Mapping[Any, Any], before: Tokens | None
    ):
        types = plan.types
        hidden = env[stretch.start]
        self.batch, self.length = hidden.shape[:2]
        # int64 [B, n], the tokens in the whole prompt; None for all of it
        self.origin: torch.Tensor | None = None
        if before is None:
            self.image, self.pad = types.flags(env, hidden)
        else:
            picked = env[stretch.picked]
            # an index_select's index has no batch, a gather's is repeated over the width
            if picked.dim() != 2:
                picked = picked[None] if picked.dim() == 1 else picked[..., 0]
            self.image = before.image.gather(1, picked)
            self.pad = None if before.pad is None else before.pad.gather(1, picked)
            self.origin = picked if before.origin is None else before.origin.gather(1, picked)
            if stretch.kept is not None:  # places that only fill a row up
                spare = env[stretch.kept] < 0
                self.pad = spare if self.pad is None else self.pad | spare
        place = torch.arange(self.length, device=hidden.device)[None].expand(self.batch, self.length)
        self.packed: Segments | None = None
        self.segments, self.counts = None, None
        if stretch.offsets is not None:
            first = plan.stretches[0].offsets
            self.packed = Segments(env[stretch.offsets], env[first].shape[0] - 1)
            self.starts, self.lengths = self.packed.ends[:-1].long()[None], self.packed.lengths[None]
            self.segments = self.packed.owners(self.length)
            text = self.packed.lengths
            self.text = text if types.kind == "none" else text - self.packed.total(self.image)
        elif self.pad is None:
            self.starts = place.new_zeros((self.batch, 1))
            self.lengths = torch.full_like(self.starts, 1) * self.length
        else:
            real = (~self.pad).to(torch.int32)
            self.starts, self.lengths = real.argmax(1, keepdim=True), real.sum(1, keepdim=True)
            self.segments, self.counts = -self.pad.to(torch.int32), self.lengths[:, 0]
        self.rows = torch.ops.thresher.probe_positions(
            self.starts, self.lengths, config.recent, config.spread, config.seed
        )
        self.protected = None
        if config.mode == "protected":
            self.protected = ~self.image if types.kind != "none" else self._near(place, config)
            if self.pad is not None:
                self.protected = self.protected & ~self.pad

    def _near(self, place: torch.Tensor, config: Any) -> torch.Tensor:
        """bool [B, n]: the last tokens and the first ones, where all is text."""
        starts, lengths = self.starts, self.lengths
        if self.packed is not None:
            own = self.segments.long().clamp_max(starts.shape[1] - 1)  # type: ignore[union-attr]
            starts, lengths = starts.gather(1, own), lengths.gather(1, own)
        inside = place - starts
        return (inside >= lengths - config.recent) | (inside < config.sinks)
