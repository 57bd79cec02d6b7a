"""What rewritten weights take, as a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def savings(sizes: Sequence[tuple[int, int]]) -> list[str]:
    """The sentence about linears' weights, each given as (bytes before, bytes after); none for no linears."""
    if not sizes:
        return []
    before, after = (sum(size) / 1e6 for size in zip(*sizes))
    return [f"the weights of {len(sizes)} linears take {after:.3g} MB instead of {before:.3g} MB."]
