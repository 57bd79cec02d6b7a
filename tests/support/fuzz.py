"""What the fuzz tests share: how many examples run, random batches, and the oracle, which is eager in higher precision.

A plain run is the first chunk of each test, a third as long, the same examples every time. `--thorough` runs all CHUNKS,
with models of its own in each and new examples every time; a failing example is kept under THRESHER_FUZZ_DATABASE (else in
.hypothesis/fuzz) and tried first from then on. One chunk alone: pytest --thorough "tests/fuzz/test_programs.py::...[17]".
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from thresher.verdict import FACTOR, FLOOR

CHUNKS = 100
chunks = pytest.mark.parametrize(
    "chunk", [0, *(pytest.param(n, marks=pytest.mark.thorough) for n in range(1, CHUNKS))]
)
PLAIN = 3  # a plain run's chunk has so many times fewer models and examples


def size(chunk: int, models: int, examples: int) -> tuple[int, int]:
    """How many models a chunk draws from, and how many examples it has: the first, which every plain run runs, fewer."""
    return (models // PLAIN, examples // PLAIN) if chunk == 0 else (models, examples)


WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def examples(count: int, chunk: int) -> settings:
    """Hypothesis's settings for one chunk of so many examples."""
    found = os.environ.get("THRESHER_FUZZ_DATABASE", ".hypothesis/fuzz")
    kept = (
        {"derandomize": True, "database": None}
        if chunk == 0
        else {"database": DirectoryBasedExampleDatabase(found)}
    )
    return settings(
        max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], **kept
    )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Rows of so many real tokens. side: where the padding stands. holes: every fourth column is no token either."""

    lengths: tuple[int, ...]
    side: str = "right"
    holes: bool = False
    seed: int = 0

    def mask(self) -> torch.Tensor:
        """bool [rows, longest]."""
        places = torch.arange(max(self.lengths, default=1) or 1)[None]
        real = places < torch.tensor(self.lengths, dtype=torch.long)[:, None]
        if self.holes:
            real = real & ((places % 4 != 2) | (places >= 8))
        return real if self.side == "right" else real.flip(1)

    def ids(self, vocabulary: int) -> torch.Tensor:
        """int64, 0 at pads."""
        mask = self.mask()
        make = torch.Generator().manual_seed(self.seed)
        return torch.randint(1, vocabulary, mask.shape, generator=make) * mask


def batches(rows: tuple[int, int], columns: tuple[int, int], empty: bool = False, wide: int = 1):
    """Batches of so many rows and columns, from one to another. empty: rows may have no token. wide: least columns."""
    lengths = st.lists(
        st.integers(0 if empty else columns[0], columns[1]), min_size=rows[0], max_size=rows[1]
    )
    lengths = lengths.filter(lambda l: max(l, default=wide) >= wide)
    sides = st.sampled_from(["right", "right", "left"])
    return st.builds(
        Batch, lengths.map(tuple), sides, st.sampled_from([False, False, False, True]), st.integers(0, 3)
    )


def in_higher_precision(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy that computes in the precision that `dtype` is judged by."""
    made = copy.deepcopy(model).to(WIDER[dtype])
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")  # torch's grouped product takes no doubles
    return made


def assert_as_good(true, own, got, real, dtype, extra: float = 0.0) -> None:
    """Fails unless `got` is about as near to `true` as the model's own result is.

    real: bool [rows, columns], which of a result's leading positions to compare, or None for all. extra: what may be
    added, relative to the largest value.
    """
    assert got.shape == own.shape and got.dtype == own.dtype
    if real is not None:
        true, own, got = (t[real] for t in (true, own, got))
    if not true.numel():
        return
    most = true.double().abs().max().clamp_min(1e-30)
    if not most.isfinite():
        return  # the model itself overflows
    ours, theirs = ((t.double() - true.double()).abs().max() / most for t in (got, own))
    allowed = (1 + FACTOR) * theirs + FLOOR[dtype] + extra
    assert ours <= allowed, f"{ours:.3g} off, the model itself {theirs:.3g}, allowed {allowed:.3g}"


# The ways in which weights change under a compiled model.
EDITS = {
    "in place": lambda m: [p.mul_(1.25) for p in m.parameters()],
    "data": lambda m: [setattr(p, "data", p.data * 0.75) for p in m.parameters()],
    "load": lambda m: m.load_state_dict({k: v * 1.25 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 0.75 for k, v in m.state_dict().items()}, assign=True),
    "one": lambda m: next(m.parameters()).add_(0.05),
}


def at_once(works: Iterable[Callable[[], Any]]) -> None:
    """Call each in a thread of its own; raises what the first to fail raised."""
    failed: list[BaseException] = []

    def run(work):
        try:
            work()
        except BaseException as failure:
            failed.append(failure)

    threads = [threading.Thread(target=run, args=(w,)) for w in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]
