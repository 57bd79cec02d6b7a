"""Bins hold every sequence once, never overflow, and are exactly those of first-fit decreasing."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import ArgumentError
from thresher.runtime.packing import binpack
from thresher.runtime.packing.binpack import pack_dataset


def first_fit_decreasing(lengths, capacity):
    bins, room = [], []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if not fitting:
            fitting = [len(bins)]
            bins.append([])
            room.append(capacity)
        bins[fitting[0]].append(length)
        room[fitting[0]] -= length
    return bins


@pytest.mark.parametrize("histogram_from", [0, 10**9], ids=["histogram", "tree"])
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=80), st.integers(0, 40))
def test_bins_are_those_of_first_fit_decreasing(histogram_from, lengths, spare):
    capacity = max(lengths, default=0) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binpack, "_WORTH_A_HISTOGRAM", histogram_from)
        bins = pack_dataset(lengths, capacity)
    assert [[lengths[i] for i in row] for row in bins] == first_fit_decreasing(lengths, capacity)
    assert sorted(bins.items.tolist()) == list(range(len(lengths)))
    assert bins.used.tolist() == [sum(lengths[i] for i in row) for row in bins]
    assert bins.used.max(initial=0) <= capacity


@pytest.mark.parametrize("many", [1, 50])
def test_a_large_data_set_is_nearly_full(many):
    lengths = np.random.default_rng(0).integers(1, 513, 1000).repeat(many)
    bins = pack_dataset(lengths, 2048)
    assert bins.used.sum() == lengths.sum() and bins.fill > 0.98
    assert np.array_equal(np.sort(bins.items), np.arange(len(lengths)))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_lengths_come_as_list_array_or_tensor(kind):
    bins = pack_dataset(kind([5, 3, 2, 7]), capacity=8)
    assert list(bins) == [[3], [0, 1], [2]] and len(bins) == 3 and bins[-1] == [2]
    assert bins.fill == pytest.approx(17 / 24)


def test_the_longest_length_is_the_default_capacity():
    assert pack_dataset([4, 4, 2, 2]).capacity == 4 and pack_dataset([]).capacity == 0


@pytest.mark.parametrize("lengths, rows", [([], 0), ([0], 1), ([0, 0, 3], 1), ([1], 1), ([6, 6, 6], 3)])
def test_small_cases(lengths, rows):
    bins = pack_dataset(lengths)
    assert len(bins) == rows and sorted(bins.items.tolist()) == list(range(len(lengths)))
    with pytest.raises(IndexError):
        bins[rows]


@pytest.mark.parametrize(
    "lengths, capacity, words",
    [
        ([3, 9, 10], 8, ["capacity", "10", "2 sequences"]),
        ([3, -1], None, ["lengths", "-1"]),
        ([1.5], None, ["float64"]),
        ([[1, 2]], None, ["(1, 2)"]),
    ],
)
def test_bad_lengths_are_refused(lengths, capacity, words):
    with pytest.raises(ArgumentError) as error:
        pack_dataset(lengths, capacity)
    assert all(word in str(error.value) for word in words)


def test_a_million_lengths_take_well_under_a_second_and_ten_thousand_milliseconds():
    make = np.random.default_rng(0)
    for count, seconds in ((1_000_000, 1.0), (10_000, 0.05)):
        lengths = np.clip(make.lognormal(5, 1, count).astype(int), 1, 2048)
        spent = []
        for _ in range(3):
            begin = time.thread_time()
            pack_dataset(lengths, 2048)
            spent.append(time.thread_time() - begin)
        assert min(spent) < seconds
