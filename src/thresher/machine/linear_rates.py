"""What linears take on this CPU, for recipes that leave sites at which they would lose: measured once, and kept.

Which form of a linear is the fastest hangs on the machine and on the number of rows: bfloat16 is twice as fast as fp32 on
one CPU and slower on the next, and weights of four bits win at one row and lose at 512. `thresher doctor --calibrate`
measures everything; here only the classes that a recipe chooses between are, on a coarse grid, about a second each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import ops
from ..files import keep_measurement, measurements
from ..op import unwatched
from ..pricing import LinearRate
from .device_rates import copies, least_seconds, surface
from .devices import Device, Surface, cpu_key

ROWS = (1, 8, 64, 512)
SIDES = (384, 1024, 2048)  # of a square weight
ROUNDS = 3
DTYPES = ("float32", "bfloat16", "float16")
enabled = True
"""Whether anything is measured; a suite of tests sets it off, so that its results do not hang on the machine."""
_KNOWN: dict[str, Surface] = {}


def with_linears(device: Device, kernels: Iterable[str], dtypes: Iterable[str]) -> Device:
    """The device with measured times of linears by weights as they are, and of these classes of kernels.

    kernels: "linear.bfloat16", or an operator's class such as "nvfp4_linear.int8". dtypes: of the activations, by name.
    Other devices than CPUs are given back as they are, and so is one whose times are all known. Nothing is measured where
    several processes share a model: each would find other times, and decide otherwise.
    """
    wanted = list(kernels)
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if device.kind != "cpu" or not enabled or not wanted or shared:
        return device
    of = [d for d in dict.fromkeys(dtypes) if d in DTYPES]
    names = [f"linear.{d}" for d in of]
    for kernel in wanted:
        names += [kernel] if kernel.startswith("linear.") else [f"{kernel}.{d}" for d in of]
    missing = [n for n in dict.fromkeys(names) if n not in device.surfaces and not _calibrated(device, n)]
    found = {n: s for n in missing if (s := times(n)) is not None}
    if not found:
        return device
    source = f"linears measured here with {torch.get_num_threads()} thread(s); the rest: {device.source}"
    return dataclasses.replace(device, surfaces={**device.surfaces, **found}, source=source)


def _calibrated(device: Device, name: str) -> bool:
    """Whether a calibration has the class for fp32 activations, under its own name."""
    kernel, _, dtype = name.rpartition(".")
    return dtype == "float32" and kernel in device.surfaces


def times(name: str) -> Surface | None:
    """Seconds of "linear.DTYPE", or of an operator's class and the activations' dtype, as kept or measured now; None for a
    class that no operator has."""
    key = json.dumps([cpu_key(), torch.__version__, torch.get_num_threads(), name])
    if key not in _KNOWN:
        kept = measurements(_FILE).get(key)
        made = _surface(kept) if kept is not None else None
        if made is None:
            made = _measured(name)
            if made is None:
                return None
            keep_measurement(_FILE, key, dataclasses.asdict(made))
        _KNOWN[key] = made
    return _KNOWN[key]


def _measured(name: str) -> Surface | None:
    make = _maker(name)
    if make is None:
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unwatched():
        points = {(float(r), float(s * s)): least_seconds(make(r, s), ROUNDS) for s in SIDES for r in ROWS}
    return surface(points)


def _maker(name: str) -> Callable[[int, int], Callable[[], Any]] | None:
    """What makes the call to time, from rows and the side of a square weight."""
    kernel, _, dtype_name = name.rpartition(".")
    dtype = getattr(torch, dtype_name)
    make_weight: Callable[[int], tuple[torch.Tensor, ...]]
    run: Callable[..., Any]
    rates = (r for op in ops.all_ops() for r in op.rates if isinstance(r, LinearRate))
    rate = next((r for r in rates if r.kernel in (kernel, name)), None)
    if rate is not None:
        make_weight, run = rate.weight, rate.run
    elif kernel == "linear":
        make_weight, run = lambda side: (torch.randn(side, side).to(dtype),), torch.nn.functional.linear
    else:
        return None

    def make(rows: int, side: int) -> Callable[[], Any]:
        x = torch.randn(rows, side).to(dtype)
        weights = copies(lambda: make_weight(side))
        return lambda: run(x, *next(weights))

    return make


_FILE = "linear_rates.json"


def _surface(kept: Any) -> Surface | None:
    """A surface as it was written; None for anything else."""
    try:
        rows, sizes = (tuple(float(v) for v in kept[name]) for name in ("rows", "sizes"))
        seconds = tuple(tuple(float(s) for s in line) for line in kept["seconds"])
    except (KeyError, TypeError, ValueError):
        return None
    fits = rows and sizes and len(seconds) == len(rows) and all(len(line) == len(sizes) for line in seconds)
    rising = list(rows) == sorted(set(rows)) and list(sizes) == sorted(set(sizes))
    good = fits and rising and all(0 < s < 1e6 for line in seconds for s in line)
    return Surface(rows, sizes, seconds) if good else None
