"""Measures this CPU for the cost model: `thresher doctor --calibrate`. Half a minute on an idle machine.

Each kernel class is timed on a grid (rows by weights, or length by head width) with the threads torch
has now; the least of several timings counts, since whatever else runs can only add to it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..pricing import LinearRate
from ..progress import progress
from .devices import Device, Surface, guessed_cpu

ROWS = (1, 4, 16, 64, 256, 1024)
SIDES = (192, 384, 768, 1536, 3072)  # of a square weight: from the caches' sizes to main memory's
LENGTHS = (8, 32, 128, 512)
WIDTHS = (32, 64)
_LARGEST = 3e9  # multiply-adds in one timed call; larger points are scaled up from fewer rows


def measure_cpu(quick: bool = False) -> Device:
    """This CPU with torch's present number of threads. quick: a coarser grid, for tests."""
    rows, sides, lengths = (ROWS, SIDES, LENGTHS) if not quick else (ROWS[::3], SIDES[:2], LENGTHS[:2])
    cases = list(_cases(rows, sides, lengths))
    found: dict[str, dict[tuple[float, float], float]] = {}
    with torch.no_grad():
        for kernel, row, size, make in progress(cases, "measuring this CPU"):
            found.setdefault(kernel, {})[row, size] = least_seconds(make(), 1 if quick else 7)
        bandwidth, launch, pointwise = _bandwidth(quick), _launch(), _pointwise()
    surfaces = {name: surface(points) for name, points in found.items()}
    guess = guessed_cpu()
    linear = found["linear.float32"]
    best = max(2 * r * w / s for (r, w), s in linear.items())
    return Device(
        "CPU",
        "cpu",
        {"float32": best, **{k: v for k, v in guess.flops.items() if k != "float32"}},
        bandwidth,
        launch,
        pointwise,
        f"measured here with {torch.get_num_threads()} thread(s)",
        surfaces,
    )


Make = Callable[[], Callable[[], Any]]


def _cases(
    rows: Sequence[int], sides: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[str, float, float, Make]]:
    """(kernel class, row of the grid, column of the grid, what makes the call to time)."""
    rates = [rate for op in ops.all_ops() for rate in op.rates]
    linears = {f"linear.{name}": _linear(getattr(torch, name)) for name in ("float32", "bfloat16")}
    linears |= {rate.kernel: functools.partial(_own, rate) for rate in rates if isinstance(rate, LinearRate)}
    attentions: dict[str, Any] = {"attention.float32": _padded}
    attentions |= {rate.kernel: rate.call for rate in rates if not isinstance(rate, LinearRate)}
    for side in sides:
        for row in rows:
            if row * side * side > _LARGEST:
                continue
            for kernel, make in linears.items():
                yield kernel, row, side * side, functools.partial(make, row, side)
    for length in lengths:
        for width in WIDTHS:
            for kernel, call in attentions.items():
                yield kernel, length, width, functools.partial(_per_million, call, length, width)


def _linear(dtype: torch.dtype) -> Callable[[int, int], Callable[[], Any]]:
    def make(rows: int, side: int) -> Callable[[], Any]:
        x, weights = (
            torch.randn(rows, side, dtype=dtype),
            copies(lambda: torch.randn(side, side, dtype=dtype)),
        )
        return lambda: F.linear(x, next(weights))

    return make


def _own(rate: LinearRate, rows: int, side: int) -> Callable[[], Any]:
    """The timed call of an operator over weights of its own format."""
    x, weights = torch.randn(rows, side), copies(lambda: rate.weight(side))
    return lambda: rate.run(x, *next(weights))


def copies(make: Callable[[], Any], total: float = 64e6) -> Iterator[Any]:
    """The weights of a model's layers in turn: one alone would stay in the cache, which in a model it does not."""
    first = make()
    tensors = first if isinstance(first, tuple) else (first,)
    size = sum(t.numel() * t.element_size() for t in tensors)
    made = [first] + [make() for _ in range(min(11, max(1, int(total / size)) - 1))]

    def forever() -> Iterator[Any]:
        while True:
            yield from made

    return forever()


_HEADS = 12


def _padded(length: int, width: int) -> tuple[Callable[[], Any], float]:
    """PyTorch's attention over four rows, and its FLOPs."""
    q, k, v = (torch.randn(4, _HEADS, length, width) for _ in range(3))
    flops = 4 * 4 * _HEADS * length * length * width
    return lambda: F.scaled_dot_product_attention(q, k, v), flops


def _per_million(
    make: Callable[[int, int], tuple[Callable[[], Any], float]], length: int, width: int
) -> Callable[[], Any]:
    """An attention's call, marked so that `least_seconds` gives the seconds of a million of its FLOPs."""
    call, flops = make(length, width)
    call.__dict__["share"] = flops / 1e6
    return call


def least_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Least seconds of a call, or of a million of its FLOPs where it says how many it has.

    On one thread its CPU time counts, which other programs disturb less than the clock on the wall.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    started = clock()
    call()
    once = max(clock() - started, 1e-7)
    count = max(1, min(200, round(0.004 / once)))
    best = float("inf")
    for _ in range(rounds):
        started = clock()
        for _ in range(count):
            call()
        best = min(best, (clock() - started) / count)
    return best / getattr(call, "share", 1.0)


def surface(points: dict[tuple[float, float], float]) -> Surface:
    """The grid; a point that was too large to time follows from the row before it, in proportion."""
    rows, sizes = (tuple(sorted({p[i] for p in points})) for i in (0, 1))
    table: list[list[float]] = []
    for i, row in enumerate(rows):
        table.append(
            [points.get((row, s)) or table[i - 1][j] * row / rows[i - 1] for j, s in enumerate(sizes)]
        )
    return Surface(rows, sizes, tuple(map(tuple, table)))


def _bandwidth(quick: bool) -> float:
    source = torch.empty((4 if quick else 64) << 20, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / least_seconds(lambda: target.copy_(source), 3)


def _launch() -> float:
    one = torch.zeros(1)
    return least_seconds(lambda: F.linear(one, one[None]), 3)


def _pointwise() -> float:
    x = torch.randn(1 << 16)
    return x.numel() / least_seconds(lambda: F.silu(x), 3)
