"""What sites gained, as one number."""

from __future__ import annotations

import statistics
from collections.abc import Mapping


def mean_gain(gains: Mapping[str, float]) -> float | None:
    """The sites' speed over what it was, as one number: their geometric mean; None without sites."""
    known = [g for g in gains.values() if g > 0]
    return statistics.geometric_mean(known) if known else None


def speed(gains: Mapping[str, float]) -> str:
    """That number as it is shown; nothing without sites."""
    mean = mean_gain(gains)
    return "" if mean is None else f"{mean:.2f}x"
