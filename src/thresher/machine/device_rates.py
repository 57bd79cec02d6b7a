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
from ..formats import bitpack
from ..report import progress
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
            found.setdefault(kernel, {})[row, size] = _least(make(), 1 if quick else 7)
        bandwidth, launch, pointwise = _bandwidth(quick), _launch(), _pointwise()
    surfaces = {name: _surface(points) for name, points in found.items()}
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
    for side in sides:
        for row in rows:
            if row * side * side > _LARGEST:
                continue
            for kernel, make in _LINEARS.items():
                if kernel.startswith("linear.") or kernel.split(".")[0] in {op.name for op in ops.all_ops()}:
                    yield kernel, row, side * side, functools.partial(make, row, side)
    packed = "varlen_attention" in {op.name for op in ops.all_ops()}
    for length in lengths:
        for width in WIDTHS:
            yield "attention.float32", length, width, functools.partial(_padded, length, width)
            if packed:
                yield "varlen_attention.float32", length, width, functools.partial(_packed, length, width)


def _linear(dtype: torch.dtype) -> Callable[[int, int], Callable[[], Any]]:
    def make(rows: int, side: int) -> Callable[[], Any]:
        x, weights = (
            torch.randn(rows, side, dtype=dtype),
            _copies(lambda: torch.randn(side, side, dtype=dtype)),
        )
        return lambda: F.linear(x, next(weights))

    return make


def _wna16(bits: int) -> Callable[[int, int], Callable[[], Any]]:
    def make(rows: int, side: int) -> Callable[[], Any]:
        x = torch.randn(rows, side)
        words = bitpack.words(side, bits)

        def weight() -> tuple[torch.Tensor, torch.Tensor]:
            codes = torch.randint(0, 1 << 30, (side, words), dtype=torch.int32)
            return codes, torch.rand(side, side // 64)

        weights = _copies(weight)
        return lambda: torch.ops.thresher.wna16_linear(x, *next(weights), None, None, bits, 64)

    return make


def _nvfp4(mode: str) -> Callable[[int, int], Callable[[], Any]]:
    def make(rows: int, side: int) -> Callable[[], Any]:
        x, scale = torch.randn(rows, side), torch.ones(())

        def weight() -> tuple[torch.Tensor, torch.Tensor]:
            codes = torch.randint(0, 256, (side, side // 2), dtype=torch.uint8)
            return codes, torch.rand(side, side // 16).add(0.5).to(torch.float8_e4m3fn)

        weights = _copies(weight)
        return lambda: torch.ops.thresher.nvfp4_linear(x, *next(weights), scale, None, None, mode)

    return make


_LINEARS: dict[str, Callable[[int, int], Callable[[], Any]]] = {
    "linear.float32": _linear(torch.float32),
    "linear.bfloat16": _linear(torch.bfloat16),
    "wna16_linear.3": _wna16(3),
    "wna16_linear.4": _wna16(4),
    "wna16_linear.8": _wna16(8),
    "nvfp4_linear.exact": _nvfp4("exact"),
    "nvfp4_linear.int16": _nvfp4("int16"),
    "nvfp4_linear.int8": _nvfp4("int8"),
}


def _copies(make: Callable[[], Any], total: float = 64e6) -> Iterator[Any]:
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


def _padded(length: int, width: int) -> Callable[[], Any]:
    q, k, v = (torch.randn(4, _HEADS, length, width) for _ in range(3))
    return _per_million(
        lambda: F.scaled_dot_product_attention(q, k, v), 4 * 4 * _HEADS * length * length * width
    )


def _packed(length: int, width: int) -> Callable[[], Any]:
    q, k, v = (torch.randn(1, _HEADS, 4 * length, width) for _ in range(3))
    ends = torch.arange(0, 4 * length + 1, length, dtype=torch.int32)
    scale = width**-0.5
    return _per_million(
        lambda: torch.ops.thresher.varlen_attention(q, k, v, ends, length, scale, False, -1, 0.0),
        4 * 4 * _HEADS * length * length * width,
    )


def _per_million(call: Callable[[], Any], flops: float) -> Callable[[], Any]:
    call.__dict__["share"] = flops / 1e6
    return call


def _least(call: Callable[[], Any], rounds: int) -> float:
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


def _surface(points: dict[tuple[float, float], float]) -> Surface:
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
    return 2 * source.numel() / _least(lambda: target.copy_(source), 3)


def _launch() -> float:
    one = torch.zeros(1)
    return _least(lambda: F.linear(one, one[None]), 3)


def _pointwise() -> float:
    x = torch.randn(1 << 16)
    return x.numel() / _least(lambda: F.silu(x), 3)
