"""Bin packing: which sequences share a row of fixed capacity.

First-fit decreasing, exactly: sequences from long to short, each into the first row it fits. Its
row count is at most 11/9 of the best possible (plus one). Two ways to compute the same rows: a
tree over the rows, about a microsecond a sequence; and, where many lengths are equal, the length
histogram, whose cost follows the distinct lengths (a million sequences in a fraction of a second).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from thresher.errors import ArgumentError

Ints = npt.NDArray[np.int64]
_WORTH_A_HISTOGRAM = 40  # sequences per distinct length; one length costs about as much as 40 tree steps


@dataclass(frozen=True)
class Bins:
    """Which sequences share a row: row r holds `items[offsets[r] : offsets[r + 1]]`, longest first.

    items: int64 [sequences], each index once. offsets: int64 [rows + 1]. used: int64 [rows],
    tokens in each row, at most `capacity`.
    """

    items: Ints
    offsets: Ints
    used: Ints
    capacity: int

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, row: int) -> list[int]:
        row = range(len(self))[row]
        return self.items[self.offsets[row] : self.offsets[row + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[row] for row in range(len(self)))

    @property
    def fill(self) -> float:
        """The share of all rows' capacity that tokens take."""
        return float(self.used.sum()) / (len(self) * self.capacity) if len(self) and self.capacity else 1.0


def pack_dataset(lengths: Sequence[int] | npt.ArrayLike | torch.Tensor, capacity: int | None = None) -> Bins:
    """Assign sequences to rows of `capacity` tokens by first-fit decreasing.

    lengths: token counts, 0 allowed. capacity: the longest of them when None.
    Raises ArgumentError for lengths that are not whole numbers >= 0 or do not fit in a row.

        for row in thresher.pack_dataset([5, 3, 2, 7], capacity=8):  # [3], [0, 1], [2]
            ...
    """
    sizes = _checked(lengths)
    longest = int(sizes.max(initial=0))
    capacity = longest if capacity is None else capacity
    if capacity < longest:
        too_long = int((sizes > capacity).sum())
        raise ArgumentError(
            "capacity",
            capacity,
            f"at least the longest length, {longest}",
            f"Truncate or split the {too_long} sequences that are longer, or raise the capacity.",
        )
    # A 16-bit key makes NumPy's stable sort a radix sort.
    key = sizes.astype(np.uint16) if longest < 1 << 16 else sizes
    by_length = np.argsort(key, kind="stable")[::-1]
    falling = sizes[by_length]
    distinct = 1 + np.count_nonzero(np.diff(falling))
    first_fit = _by_tree if len(sizes) < _WORTH_A_HISTOGRAM * distinct else _by_histogram
    row_of = first_fit(falling, capacity)
    rows = int(row_of.max(initial=-1)) + 1
    order = np.argsort(row_of, kind="stable")
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=offsets[1:])
    used = np.bincount(row_of, weights=falling, minlength=rows).astype(np.int64)
    return Bins(by_length[order], offsets, used, capacity)


def best_capacity(lengths: Sequence[int], token_cost: float, pair_cost: float) -> int:
    """The capacity at which rows with a block mask cost least: rows * (w * token_cost + w^2 * pair_cost).

    Longer rows waste less on filler and more on masked pairs. Tried are the longest length (the published
    choice) and steps up to all tokens in one row.
    """
    longest, tokens = max(lengths, default=0), sum(lengths)
    tried = {longest, tokens} | {round(longest * step / 4) for step in range(5, 17)}
    sizes = [w for w in sorted(tried) if longest <= w <= max(tokens, longest)]
    return min(sizes, key=lambda w: len(pack_dataset(lengths, w)) * w * (token_cost + pair_cost * w))


def _checked(lengths: Sequence[int] | npt.ArrayLike | torch.Tensor) -> Ints:
    sizes = lengths.numpy(force=True) if isinstance(lengths, torch.Tensor) else np.asarray(lengths)
    if sizes.size == 0:
        return np.zeros(0, np.int64)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or sizes.min() < 0:
        raise ArgumentError(
            "lengths",
            f"{sizes.dtype} of shape {sizes.shape}, smallest {sizes.min()}",
            "a flat sequence of whole numbers >= 0",
            "Pass the number of tokens of each sequence.",
        )
    return sizes.astype(np.int64)


def _by_tree(sizes: Ints, capacity: int) -> Ints:
    """The row of each sequence by first fit, where a tree holds the most room left below each node."""
    leaves = 1 << max(len(sizes) - 1, 1).bit_length()
    room = [capacity] * (2 * leaves)
    row_of = np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:  # not in the left half, and the parent had room: in the right half
                node += 1
        row_of[i] = node - leaves
        room[node] = most = room[node] - size
        while node > 1:
            most = max(most, room[node ^ 1])
            node >>= 1
            if room[node] == most:
                break
            room[node] = most
    return row_of


def _by_histogram(sizes: Ints, capacity: int) -> Ints:
    """The row of each sequence by first fit; `sizes` must fall.

    The rows are kept as runs, neighbours with equal room left: [first row, rows, room] in each
    column. A length that fills a run to the end only changes its room; the run where the length
    runs out is split in up to three, and what fits nowhere opens at most two new runs.
    """
    lengths, counts = np.unique(sizes, return_counts=True)
    smallest = int(lengths[lengths > 0].min(initial=max(capacity, 1)))
    runs = np.zeros((3, 0), np.int64)
    rows = 0
    placed: list[Ints] = []  # [first row, rows, sequences in each], columns in the order of `sizes`
    for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist()):
        if length == 0:  # takes no room, so the first row has it
            placed.append(np.array([[0], [1], [count]]))
            break
        fits = (runs[2] >= length).nonzero()[0]
        each = runs[2, fits] // length
        reach = np.cumsum(each * runs[1, fits])
        whole = int(np.searchsorted(reach, count, side="right"))  # runs in which every row takes all it can
        if whole:
            filled, each_filled = fits[:whole], each[:whole]
            placed.append(np.stack([runs[0, filled], runs[1, filled], each_filled]))
            runs[2, filled] -= each_filled * length
            count -= int(reach[whole - 1])
        if count and whole < len(fits):
            at = int(fits[whole])
            first, number, room = runs[:, at].tolist()
            split = _open(first, number, room, length, count)
            placed.append(_taken(split, room, length))
            runs = np.concatenate([runs[:, :at], split, runs[:, at + 1 :]], axis=1)
        elif count:
            opened = -(-count // (capacity // length))
            split = _open(rows, opened, capacity, length, count)
            placed.append(_taken(split, capacity, length))
            runs = np.concatenate([runs, split], axis=1)
            rows += opened
        alive = runs[2] >= smallest
        if np.count_nonzero(alive) * 2 < len(alive):
            runs = runs[:, alive]
    return _expand(placed)


def _open(first: int, number: int, room: int, length: int, count: int) -> Ints:
    """The runs that `number` equal rows become when `count` sequences of one length go into the first."""
    full, rest = divmod(count, room // length)
    runs = [
        (first, full, room - (room // length) * length),
        (first + full, int(rest > 0), room - rest * length),
        (first + full + int(rest > 0), number - full - int(rest > 0), room),
    ]
    return np.array([run for run in runs if run[1]]).T


def _taken(runs: Ints, room: int, length: int) -> Ints:
    """What rows with `room` took to end as `runs`, as [first row, rows, sequences in each]."""
    took = np.stack([runs[0], runs[1], (room - runs[2]) // length])
    return took[:, took[2] > 0]


def _expand(placed: list[Ints]) -> Ints:
    """The row of every sequence, from [first row, rows, sequences in each] in order."""
    if not placed:
        return np.zeros(0, np.int64)
    first, number, each = np.concatenate(placed, axis=1)
    total = number * each
    within = np.arange(int(total.sum())) - np.repeat(np.cumsum(total) - total, total)
    return np.repeat(first, total) + within // np.repeat(each, total)
