"""What a session counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """calls: all of them. packed: run on real tokens only. padded: run as the model was written, with a
    count for each reason. repacked: weights recomputed because the model's changed. tokens, positions:
    real tokens, and positions of the padded batches they came in."""

    calls: int = 0
    packed: int = 0
    padded: Counter[str] = field(default_factory=Counter)
    repacked: int = 0
    lowered: int = 0
    tokens: int = 0
    positions: int = 0

    @property
    def padding(self) -> float:
        """Share of all positions so far that were padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0
