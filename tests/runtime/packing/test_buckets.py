"""The rules that say how far a batch is filled up."""

import itertools

import pytest

from thresher.errors import ArgumentError
from thresher.runtime.packing.buckets import geometric, multiple_of


def test_bucket_rules():
    assert [multiple_of(64)(n) for n in (1, 64, 65)] == [64, 64, 128]
    ladder = geometric()
    sizes = sorted({ladder(n) for n in range(1, 8193)})
    assert all(size % 64 == 0 for size in sizes) and all(ladder(s) == s for s in sizes)
    assert all(b <= max(a + 64, 1.125 * a + 64) for a, b in itertools.pairwise(sizes))
    for rule, bad in ((multiple_of, 0), (geometric, 1.0)):
        with pytest.raises(ArgumentError):
            rule(bad)
