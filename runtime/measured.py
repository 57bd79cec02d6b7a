"""What one batch showed of a rewrite, and the sentence that says it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thresher.verdict import FACTOR

from .batches import Batch


@dataclass(frozen=True)
class Found:
    """Of one batch: as in Verdict. why: what was compared, where the batch's name does not say it."""

    error: float
    allowed: float
    own: float | None = None
    why: str = ""

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @property
    def share(self) -> float:
        """The error as a part of what is allowed; infinity for NaN."""
        share = self.error / max(self.allowed, 1e-30)
        return share if share == share else float("inf")


def sentence(batch: Batch, found: Found, against: str) -> str:
    """What went wrong, and what may be done, for a rewrite that does not hold; else nothing."""
    if found.holds:
        return ""
    largest = "of that output's largest value"
    if found.own is None:
        said = f"it changed an output by {found.error:.2e} {largest}, and its budget is {found.allowed:.1e}"
    else:
        said = (
            f"its error to a run in {against} was {found.error:.2e} {largest}; the program's own is {found.own:.2e}, and "
            f"its budget, {FACTOR:g} times that and a floor, is {found.allowed:.1e}"
        )
    said = f"on {batch.label} {said}"
    return f"{said}{f' ({found.why})' if found.why else ''}."


def dtype_name(dtype: torch.dtype) -> str:
    """As in "float32"."""
    return str(dtype).removeprefix("torch.")
