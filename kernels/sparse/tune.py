"""Finds, per shape and machine, the union density up to which the sparse kernel beats the dense one.

Three timings decide: the sparse kernel at half and at full density, which give its cost as a line
over density, and the dense product. They are taken once and kept on disk, keyed by the built
kernel (which names source and CPU), PyTorch and thread count. Call `prepare` at compile time;
a shape first met in a call is measured there.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from thresher.files import keep_measurement, measurements

from .. import native
from . import cpp as sparse_native
from . import mlp as gated

BATCHES = (1, 4, 16, 32, 64)  # numbers of tokens that are measured; others use the next larger one
_ROUNDS = 9
_SECONDS = 0.5  # per shape, after the first two rounds
_PRODUCT = 16  # tokens above which the dense product computes rather than reads
_MOST = 0.7  # largest break-even there: who wins at full density depends on how busy the machine is
_FILE = "sparse_break_even.json"
_COLD = 1 << 26  # bytes of weights to rotate through, so that caches hold none of them


@dataclass(frozen=True)
class Site:
    """The shape of one sparse MLP. width: inputs of the up projection, 0 where only `down` is sparse."""

    neurons: int
    features: int
    width: int
    act_dtype: torch.dtype
    weight_dtype: torch.dtype


def bucket(tokens: int) -> int | None:
    """The measured number of tokens that stands for `tokens`; None above the largest."""
    return next((b for b in BATCHES if tokens <= b), None)


def break_even(site: Site, tokens: int) -> float:
    """The union density in 0 .. 1 up to which `tokens` tokens run sparse at this site; 0 means never."""
    standing_for = bucket(tokens)
    return 0.0 if standing_for is None else _break_even(site, standing_for, torch.get_num_threads())


def prepare(sites: Iterable[Site], batches: Iterable[int] = BATCHES[:3]) -> dict[tuple[Site, int], float]:
    """Measure these sites now, or read them from disk; what `break_even` then answers, by (site, tokens)."""
    sizes = sorted({b for b in map(bucket, batches) if b is not None})
    return {(site, tokens): break_even(site, tokens) for site in dict.fromkeys(sites) for tokens in sizes}


@functools.lru_cache(maxsize=1024)
def _break_even(site: Site, tokens: int, threads: int) -> float:
    built = Path(native.load("sparse_mlp")._name).stem
    shape = {k: str(v) for k, v in asdict(site).items()}
    key = json.dumps([built, torch.__version__, threads, tokens, shape], sort_keys=True)
    return remembered(key, lambda: measure(site, tokens))


def remembered(key: str, measured: Callable[[], float]) -> float:
    """The number kept on disk under this key, which names all it depends on; measured if there is none."""
    found = measurements(_FILE).get(key)
    if isinstance(found, (int, float)):
        return float(found)
    number = measured()
    keep_measurement(_FILE, key, number)
    return number


def copies(size: int) -> int:
    """How many weights of so many bytes to rotate through, so that caches hold none of them."""
    return max(2, min(8, -(-_COLD // max(1, size))))


def measure(site: Site, tokens: int) -> float:
    """Time the three points with random data; the break-even density, clamped to 0 .. 1."""
    generator = torch.Generator().manual_seed(0)
    row_bytes = (site.width + site.features) * site.weight_dtype.itemsize
    weights = [_weights(site, generator) for _ in range(copies(site.neurons * row_bytes))]
    x = torch.randn(tokens, max(site.width, 1), generator=generator).to(site.act_dtype)
    full = (torch.rand(tokens, site.neurons, generator=generator) + 0.1).to(site.act_dtype)
    half = full * (torch.rand(site.neurons, generator=generator) < 0.5)

    def sparse(act: torch.Tensor) -> Callable[[int], object]:
        def run(turn: int) -> object:
            up, up_scale, down, scale = weights[turn % len(weights)]
            if site.width:
                return sparse_native.mlp(
                    act, x, up, up_scale, None, "identity", down, scale, None, None, site.neurons
                )
            return sparse_native.down(act, down, scale, None, None, site.neurons)

        return run

    def dense(turn: int) -> object:
        up, up_scale, down, scale = weights[turn % len(weights)]
        h = gated.hidden(full, x, up, up_scale, None, "identity", None) if site.width else full
        return sparse_native.matmul(h, down, scale, None)

    at_half, at_full, at_dense = least_seconds((sparse(half), sparse(full), dense))
    slope, most = (at_full - at_half) / 0.5, _MOST if tokens > _PRODUCT else 1.0
    if at_full <= at_dense or slope <= 0:
        return most
    return min(most, max(0.0, (at_dense - (at_full - slope)) / slope))


def _weights(site: Site, generator: torch.Generator):
    def one(cols: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        four = site.weight_dtype == torch.uint8
        weight = torch.empty(site.neurons, cols // 2 if four else cols, dtype=site.weight_dtype)
        sparse_native.large_pages(weight)
        if four:
            return weight.random_(0, 256, generator=generator), torch.full((site.neurons,), 0.01)
        if site.weight_dtype == torch.int8:
            return weight.random_(-127, 128, generator=generator), torch.full((site.neurons,), 0.01)
        return weight.uniform_(-1, 1, generator=generator), None

    return (*one(site.width), *one(site.features))


def least_seconds(candidates: tuple[Callable[[int], object], ...]) -> list[float]:
    """Seconds of each candidate, the least over interleaved rounds.

    Alone on one thread the thread's own time is taken, which other processes cannot inflate.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(candidates)
    deadline = None
    for turn in range(_ROUNDS):
        for i, run in enumerate(candidates):
            start = clock()
            run(turn * len(candidates) + i)
            best[i] = min(best[i], clock() - start)
        if turn == 1:
            deadline = time.perf_counter() + _SECONDS
        if deadline is not None and time.perf_counter() > deadline:
            break
    return best
