"""How far to fill up the tokens of a batch, so that calls of many lengths need few sizes.

A bucket rule gives the number of packed tokens from the number of real ones; `plan` takes one.
"""

from __future__ import annotations

from collections.abc import Callable

from thresher.errors import ArgumentError


def multiple_of(step: int) -> Callable[[int], int]:
    """A bucket rule: round up to a multiple of `step`."""
    if step < 1:
        raise ArgumentError("step", step, "a positive number of tokens", "Use 64 or 128.")
    return lambda tokens: -(-tokens // step) * step


def geometric(ratio: float = 1.125, step: int = 64) -> Callable[[int], int]:
    """A bucket rule whose steps grow with T: at most `ratio` - 1 of filler, few distinct sizes."""
    if not ratio > 1:
        raise ArgumentError("ratio", ratio, "a number above 1", "Use 1.125.")
    aligned = multiple_of(step)

    def bucket(tokens: int) -> int:
        size = step
        while size < tokens:
            size = max(size + step, aligned(int(size * ratio)))
        return size

    return bucket


def ladder(limit: int, count: int = 12, step: int = 64) -> Callable[[int], int]:
    """A bucket rule with at most `count` sizes up to `limit` tokens, evenly spaced in ratio.

    More tokens than `limit` round up to a multiple of it. Fewer sizes mean fewer compilations and graphs
    for a target of fixed shapes, and more filler: 12 sizes up to 8192 cost a fifth on average.
    """
    if limit < 1 or count < 1:
        raise ArgumentError(
            "ladder", f"limit={limit}, count={count}", "at least one token and one size", "Use 12 sizes."
        )
    first, last = min(step, limit), -(-limit // step) * step
    ratio = (last / first) ** (1 / max(count - 1, 1))
    sizes = sorted({-(-round(first * ratio**i) // step) * step for i in range(count - 1)} | {last})

    def bucket(tokens: int) -> int:
        return next((size for size in sizes if size >= tokens), -(-tokens // last) * last)

    return bucket
