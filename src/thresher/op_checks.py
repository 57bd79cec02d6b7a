"""Operators against their references on the arguments that a program really gives them.

    with watch() as checks:
        ...  # run programs
    checks["varlen_attention"]  # OpCheck(provider="cpu_cpp", calls=4, error=2.1e-07)

The suite tests every provider on inputs of its own; this says what a provider did on the caller's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .op import Op, unwatched, watched

MOST_CALLS = 4
MOST_SECONDS = 5.0


@dataclass
class OpCheck:
    """provider: the one that ran last. calls: how many were compared. error: the largest relative L2 error of any
    result; of results that are no floating-point numbers, the largest share of elements that differ."""

    provider: str
    calls: int = 0
    error: float = 0.0
    seconds: float = 0.0


@contextlib.contextmanager
def watch() -> Iterator[dict[str, OpCheck]]:
    """Compare operators' calls of this thread: of each, the first MOST_CALLS, no longer than MOST_SECONDS in all."""
    found: dict[str, OpCheck] = {}

    def check(op: Op, provider: str, args: tuple[Any, ...], result: Any) -> None:
        known = found.setdefault(op.name, OpCheck(provider))
        if known.calls >= MOST_CALLS or known.seconds > MOST_SECONDS:
            return
        known.provider, started = provider, time.perf_counter()
        if provider != "reference":  # which is what it would be compared with
            with torch.no_grad(), unwatched():
                error = difference(result, op.reference(*args))
            if not error <= known.error:  # a NaN too
                known.error = error
        known.calls += 1
        known.seconds += time.perf_counter() - started

    with watched(check):
        yield found


def difference(actual: Any, expected: Any) -> float:
    """The error of a result, a tensor or several; NaN where only one of the two is a finite number."""
    pairs = zip(_tensors(actual), _tensors(expected), strict=True)
    return max((_one(a, e) for a, e in pairs), default=0.0, key=lambda e: (e != e, e))


def _tensors(result: Any) -> list[torch.Tensor]:
    given = [result] if isinstance(result, torch.Tensor) else result
    return [t for t in given if isinstance(t, torch.Tensor)]


def _one(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    if expected.element_size() == 1:  # codes, 8-bit floating-point ones among them
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    if not expected.is_floating_point():
        return float((actual != expected).float().mean())
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("nan")
    return float((actual - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30))
