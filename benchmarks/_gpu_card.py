"""What the GPU benchmark measures on: a card, or for `--dry` the CPU with Triton's interpreter in its place.

A time is the median of the device's own events over a ring of inputs that does not fit in its cache. The roofline of a
row is the larger of two times: its bytes at the bandwidth and its operations at the rate that this card was measured at.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thresher import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from gpu_checks import without_device


@dataclass
class Card:
    """bandwidth: bytes a second of a large copy, read and written. rate: operations a second of a large product.

    dry: nothing is measured; every row runs once with tiny sizes.
    """

    dry: bool
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    bandwidth: float = 0.0
    rate: float = 0.0

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.dtype = torch.float16 if self.dry else torch.bfloat16  # the interpreter computes bf16 wrongly

    def size(self, real: int, tiny: int) -> int:
        """A size: the real one, or a tiny one when dry."""
        return tiny if self.dry else real

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).mul_(scale).to(self.dtype)

    def measure(self) -> dict[str, Any]:
        """Fill in `bandwidth` and `rate`; what was measured."""
        count, side = self.size(1 << 30, 1 << 16), self.size(8192, 64)
        source = self.random(count)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / self.time(lambda: target.copy_(source))
        a, b = self.random(side, side), self.random(side, side)
        self.rate = 2 * side**3 / self.time(lambda: a @ b)
        return {"bandwidth_gb_s": self.bandwidth / 1e9, "tflop_s": self.rate / 1e12}

    def time(self, *calls: Callable[[], Any], least_ms: float = 30.0, most: int = 200) -> float:
        """Seconds of one call: the median; several calls are the same work on other inputs, in turn."""
        if self.dry:
            started = time.perf_counter()
            calls[0]()
            return max(time.perf_counter() - started, 1e-9)
        for call in (*calls, *calls)[: 2 * len(calls)]:
            call()
        torch.cuda.synchronize()
        first = self._events(calls[0])
        count = max(5, min(most, int(least_ms / 1e3 / max(first, 1e-6))))
        return statistics.median(self._events(calls[i % len(calls)]) for i in range(count))

    @staticmethod
    def _events(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def roofline(self, moved: float, operations: float) -> float:
        """Seconds that a call takes at least."""
        return max(moved / self.bandwidth, operations / self.rate)

    def run(self, name: str, *args: Any) -> Any:
        """An operator of ours by the provider that a card would choose; dry, by that provider in the interpreter."""
        op = ops.get(name)
        if not self.dry:
            return op(*args)
        provider = self.provider(name, *args)
        if provider is None:
            return op.reference(*args)
        with without_device():
            return provider.run(*args)

    def provider(self, name: str, *args: Any) -> Any:
        """The first Triton provider that takes a call."""
        for provider in ops.get(name).providers:
            takes = provider.supports_args is None or provider.supports_args(*args) is None
            if provider.device == "cuda" and "triton" in provider.name and takes:
                return provider
        return None


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error; NaN where only one of the two is finite."""
    a, e = actual.double(), expected.double()
    return float((a - e).norm() / e.norm().clamp_min(1e-30))
