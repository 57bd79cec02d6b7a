"""What the proof of one rewrite found: plain data, between whoever measures it and whoever reports it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FACTOR = 1.5
"""A rewrite may be this many times as far from a higher-precision run as the program it came from."""

# Two of our operators' tolerances against their references (see the operators' TOLERANCE): where a program's own
# error happens to be less than that, it is luck and no measure.
FLOOR = {torch.bfloat16: 1.6e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}

# What two programs that mean the same may differ by when both are run in the precision that judges the narrow one.
SAME = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 1e-6, torch.float64: 1e-11}


@dataclass(frozen=True)
class Verdict:
    """Errors are the largest difference of any result, relative to that result's largest value.

    holds: whether the rewrite is kept. error: of the rewritten program, `against` says from what; on the batch and
        the result that came nearest to (or went furthest over) what is allowed.
    own: the unrewritten program's error there, from a higher-precision run; None where none was made.
    allowed: what `error` may be. against: "float32", "float64", or "the program before".
    checked: the batches that were run, each in words. why: for a rewrite that does not hold, one sentence's middle.
    """

    holds: bool
    error: float
    allowed: float
    own: float | None = None
    against: str = "the program before"
    checked: tuple[str, ...] = ()
    why: str = ""
