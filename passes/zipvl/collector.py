"""What ZipVL learns from example prompts: which share of a layer's tokens holds tau of the attention."""

from __future__ import annotations

from typing import Any

import torch


class Pair:
    """Queries and keys of one attention, which arrive one after the other.

    A tap sees one value; importance needs both. Either side hands its value here, and the second of a
    batch counts.
    """

    def __init__(self, config: Any, scale: float):
        self.config, self.scale = config, scale
        self.waiting: dict[str, torch.Tensor] = {}
        self.shares: list[torch.Tensor] = []

    def side(self, name: str) -> _Side:
        """The collector of one side, "q" or "k"."""
        return _Side(self, name)

    def add(self, name: str, value: torch.Tensor, real: torch.Tensor | None) -> None:
        """One side's value [batch, heads, tokens, width]; with the other side's of the same batch, shares are computed."""
        self.waiting[name] = value
        if len(self.waiting) < 2:
            return
        q, k = self.waiting["q"], self.waiting["k"]
        self.waiting = {}
        batch, heads, tokens, width = q.shape
        if tokens <= self.config.recent + self.config.spread:
            return  # all would be probed
        if real is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
        starts, lengths = real.int().argmax(1, keepdim=True), real.sum(1, keepdim=True)
        ops = torch.ops.thresher
        rows = ops.probe_positions(starts, lengths, self.config.recent, self.config.spread, self.config.seed)
        at = rows.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, width)
        sums, _ = ops.probe_scores(q.gather(2, at), k, rows, real.int() - 1, self.scale)
        count = ops.adaptive_count(sums, None, self.config.tau)
        self.shares.append(count.double() / lengths[:, 0])


class _Side:
    def __init__(self, pair: Pair, name: str):
        self.pair, self.name = pair, name

    def add(self, value: torch.Tensor, real: torch.Tensor | None) -> None:
        self.pair.add(self.name, value, real)

    def result(self) -> dict[str, torch.Tensor]:
        """shares: double [prompts], how much of each prompt's tokens hold tau."""
        if self.name == "q":
            return {}
        return {"shares": torch.cat(self.pair.shares) if self.pair.shares else torch.ones(1).double()}
