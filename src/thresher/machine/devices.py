"""What a device can do: the numbers the cost model divides by.

GPUs come from their makers' data sheets, dense rates without sparsity, and are derated to what
well-written kernels reach. A CPU differs too much from the next for a table: `thresher doctor
--calibrate` measures this machine's own and keeps the result in the cache directory. Until then a CPU is
guessed from its instruction set, and the report says that it was a guess.

Units: FLOP/s with a multiply-add counted as two, bytes/s, seconds.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, ThresherError, unknown_key
from ..files import cache_dir, scratch, trusted

FORMAT = "thresher-device-1"


@dataclass(frozen=True)
class Surface:
    """Measured seconds on a grid, for what no single rate describes: a linear over rows and weights.

    rows, sizes: increasing. seconds: [row][size]. Between the points it interpolates in the logarithms;
    beyond them it goes on with time proportional to the work.
    """

    rows: tuple[float, ...]
    sizes: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]

    def at(self, rows: float, size: float) -> float:
        """Seconds at so many rows and such a size, between the measured points; beyond the last row in proportion."""
        low, high, share = _between(self.rows, rows)
        first, last = (self._along(self.seconds[i], size) for i in (low, high))
        inside = _blend(first, last, share)
        return inside * max(1.0, rows / self.rows[-1])

    def inside(self, rows: float, size: float) -> float:
        """The same, held at the edge beyond the grid: for a rate, which does not grow with the work."""
        low, high, share = _between(self.rows, rows)
        held = min(max(size, self.sizes[0]), self.sizes[-1])
        return _blend(self._along(self.seconds[low], held), self._along(self.seconds[high], held), share)

    def _along(self, line: tuple[float, ...], size: float) -> float:
        low, high, share = _between(self.sizes, size)
        inside = _blend(line[low], line[high], share)
        beyond = size / self.sizes[-1]
        return inside * (beyond if beyond > 1 else 1.0)


def _between(points: tuple[float, ...], x: float) -> tuple[int, int, float]:
    high = min(max(bisect.bisect_left(points, x), 1), len(points) - 1) if len(points) > 1 else 0
    low = max(high - 1, 0)
    if low == high:
        return low, high, 0.0
    share = (math.log(max(x, 1e-9)) - math.log(points[low])) / (
        math.log(points[high]) - math.log(points[low])
    )
    return low, high, min(max(share, 0.0), 1.0)


def _blend(a: float, b: float, share: float) -> float:
    return math.exp(math.log(a) * (1 - share) + math.log(b) * share)


@dataclass(frozen=True)
class Device:
    """One device.

    flops: dense FLOP/s of matrix products by the operands' type (float32, bfloat16, float8, int8, nvfp4),
        as reached, not as printed. bandwidth: bytes/s from main memory, as reached.
    launch: seconds a call costs however small it is. pointwise: elements/s of fused elementwise code.
    surfaces: measured times by kernel class (see `passes/cost/model.py`), where there are any.
    source: where the numbers come from, for the report.
    """

    name: str
    kind: str
    flops: Mapping[str, float]
    bandwidth: float
    launch: float
    pointwise: float
    source: str
    surfaces: Mapping[str, Surface] = field(default_factory=dict)

    def matmul(self, dtype: str) -> float:
        """FLOP/s for operands of this type; of the nearest wider type the device multiplies, else the widest."""
        for known in _WIDER.get(dtype, (dtype,)):
            if known in self.flops:
                return self.flops[known]
        return self.flops["float32"]

    def to_dict(self) -> dict[str, Any]:
        """The device as plain data, which JSON can hold."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Device:
        """The device again. Raises ArgumentError for data of another format."""
        try:
            if given["format"] != FORMAT:
                raise ValueError(f"its format is {given['format']!r}")
            known = {k: v for k, v in given.items() if k != "format"}
            known["surfaces"] = {
                name: Surface(
                    tuple(s["rows"]), tuple(s["sizes"]), tuple(tuple(line) for line in s["seconds"])
                )
                for name, s in known["surfaces"].items()
            }
            return cls(**known)
        except (KeyError, TypeError, ValueError) as reason:
            raise ArgumentError("device", f"something else ({reason})", f"what {FORMAT} describes",
                                "Run thresher doctor --calibrate again.") from None  # fmt: skip


_WIDER = {
    "nvfp4": ("nvfp4", "float8", "bfloat16", "float32"),
    "float8": ("float8", "bfloat16", "float32"),
    "int8": ("int8", "float8", "bfloat16", "float32"),
    "float16": ("bfloat16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "float32": ("float32",),
}


def bf16_products() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, and so faster than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _gpu(name: str, sheet: Mapping[str, float], terabytes: float) -> Device:
    """From a data sheet: TFLOP/s dense, TB/s. 70 % of the printed rate and 85 % of the bandwidth are what
    large kernels reach; 4 microseconds is a launch from a CUDA graph-less stream."""
    return Device(
        name,
        "cuda",
        {k: 0.7e12 * v for k, v in sheet.items()},
        0.85e12 * terabytes,
        4e-6,
        0.85e12 * terabytes / 4,
        f"data sheet of the {name}",
    )


# Data sheets: dense, no sparsity. float32 is TF32 where the chip has it, since that is what products of
# fp32 tensors may use at most; fp32 without tensor cores is far below.
DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        _gpu("A100", {"float32": 156, "bfloat16": 312, "int8": 624}, 2.04),
        _gpu("H100", {"float32": 495, "bfloat16": 989, "float8": 1979, "int8": 1979}, 3.35),
        _gpu("H200", {"float32": 495, "bfloat16": 989, "float8": 1979, "int8": 1979}, 4.8),
        _gpu("B200", {"float32": 1100, "bfloat16": 2250, "float8": 4500, "int8": 4500, "nvfp4": 9000}, 8.0),
        _gpu("L40S", {"float32": 183, "bfloat16": 362, "float8": 733, "int8": 733}, 0.864),
        _gpu("RTX 4090", {"float32": 82.6, "bfloat16": 165, "float8": 330, "int8": 661}, 1.008),
        _gpu("RTX 5090", {"float32": 104.8, "bfloat16": 209.5, "float8": 419, "int8": 838, "nvfp4": 1676}, 1.792),
    )
}  # fmt: skip

# One thread's multiply-adds a cycle are set by the width of its vectors.
_GUESSED_FLOPS = {"AVX512": 80e9, "AVX2": 40e9, "DEFAULT": 10e9}


def guessed_cpu() -> Device:
    """A CPU that was never calibrated."""
    isa = torch.backends.cpu.get_cpu_capability()
    flops = _GUESSED_FLOPS.get(isa, 20e9) * torch.get_num_threads()
    return Device("CPU", "cpu", {"float32": flops, "bfloat16": flops}, 12e9, 5e-6, 1e9 * torch.get_num_threads(),
                  f"a guess for {isa}; thresher doctor --calibrate measures it")  # fmt: skip


def cpu_key() -> str:
    """Names this processor and thread count: what was measured on another is not used here."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass
    parts = (model, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), os.cpu_count())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def cpu_path(cache: Path) -> Path:
    """Where this CPU's measured rates are kept in a cache directory."""
    return cache / "devices" / f"cpu-{cpu_key()}.json"


def save_cpu(device: Device, cache: Path) -> Path:
    """Keep a measured CPU; whole or not at all."""
    path = cpu_path(cache)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with scratch(path.parent) as made:
            (made / path.name).write_text(json.dumps(device.to_dict(), indent=1))
            (made / path.name).chmod(0o600)
            (made / path.name).replace(path)
    except OSError as reason:
        raise ThresherError(
            f"The calibration cannot be kept in {path}: {reason.strerror}. Name a directory that can be written "
            "in THRESHER_CACHE_DIR."
        ) from None
    this_cpu.cache_clear()
    return path


@functools.cache
def this_cpu(cache: Path, key: str = "") -> Device:
    """What was measured on this CPU with this many threads, or a guess. key: for the cache of this function."""
    try:
        if trusted(cpu_path(cache)):
            return Device.from_dict(json.loads(cpu_path(cache).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # damaged: calibrating again repairs it
    return guessed_cpu()


def get(name: str) -> Device:
    """A device by its name in DEVICES, or "cpu" for this machine's."""
    if name.lower() == "cpu":
        return this_cpu(cache_dir(), cpu_key())
    for known, device in DEVICES.items():
        if known.lower().replace(" ", "") == name.lower().replace(" ", ""):
            return device
    raise unknown_key("device", name, [*DEVICES, "cpu"])


def of(place: torch.device) -> Device:
    """The device a program runs on. A GPU that is in no table counts as an H100, and `source` says so."""
    if place.type != "cuda" or not torch.cuda.is_available():
        return get("cpu")
    printed = torch.cuda.get_device_name(place)
    for known in sorted(DEVICES, key=len, reverse=True):
        if known in printed or known.replace("RTX ", "GeForce RTX ") in printed:
            return DEVICES[known]
    h100 = DEVICES["H100"]
    return Device(printed, "cuda", h100.flops, h100.bandwidth, h100.launch, h100.pointwise,
                  f"{printed} is in no table; an H100's numbers stand in for it")  # fmt: skip
