"""Texts in groups of so many tokens: what packing wants instead of sorting by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def token_counts(tokenizer: Any, texts: Sequence[Any], longest: int | None) -> list[int]:
    """How many tokens each text (or pair of texts) becomes, cut off at `longest`."""
    encoded = tokenizer(list(texts), truncation=True, max_length=longest, padding=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]


def groups(counts: Sequence[int], tokens: int) -> Iterator[slice]:
    """Runs of neighbours whose counts come to at most `tokens`; a count above that is a run of its own."""
    first, held = 0, 0
    for index, count in enumerate(counts):
        if index > first and held + count > tokens:
            yield slice(first, index)
            first, held = index, 0
        held += count
    if counts:
        yield slice(first, len(counts))
