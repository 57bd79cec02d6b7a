"""What operators that choose at run time did, by site: calls sparse and dense, and how many neurons were on.

A site is the name that a rewrite gave to one MLP. On CPU the counts are plain numbers. On a GPU
the kernels add neurons up in a device tensor, which is read only when somebody asks, so that a call
never waits for the device and replays of a CUDA graph are counted too. The operators count, reports read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class SiteCount:
    """Counts of one site since the last `reset`."""

    sparse: int = 0  # on a GPU: launches by Python, replays of a CUDA graph aside
    dense: int = 0
    active: int = 0  # neurons in the unions, over the calls in which they were counted
    seen: int = 0  # neurons there were, over the same calls
    on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def device_counter(self, device: torch.device) -> torch.Tensor:
        """int64 [2] on `device`, to which a kernel adds its union's size and its number of neurons."""
        if device not in self.on_device:
            self.on_device[device] = torch.zeros(2, dtype=torch.int64, device=device)
        return self.on_device[device]

    @property
    def union_density(self) -> float | None:
        """Mean share of neurons that a call's tokens kept, or None before the first counted call."""
        active, seen = self.active, self.seen
        for counter in self.on_device.values():
            more_active, more_seen = counter.tolist()
            active, seen = active + more_active, seen + more_seen
        return active / seen if seen else None


_SITES: dict[str, SiteCount] = {}
_paused = 0


def site(name: str) -> SiteCount:
    """The counts of the site of that name, new if need be."""
    return _SITES.setdefault(name, SiteCount())


def count(name: str, neurons: int, active: int | None) -> None:
    """Count one call: `active` neurons in the union, or None when the call went to the dense kernel."""
    if not name or _paused:
        return
    entry = site(name)
    if active is None:
        entry.dense += 1
    else:
        entry.sparse += 1
        entry.active += active
        entry.seen += neurons


def count_on_device(name: str, device: torch.device) -> torch.Tensor | None:
    """Count one sparse call whose union only the device knows; the counter for the kernel, if any.

    None, too, for a counter that would be made while a CUDA graph is captured: the graph would zero it at each replay.
    """
    if not name or _paused:
        return None
    entry = site(name)
    entry.sparse += 1
    if device not in entry.on_device and _capturing():
        return None
    return entry.device_counter(device)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Calls within are not counted: those that only compare one program with another."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


def all_sites() -> dict[str, SiteCount]:
    """Every site counted so far, by name."""
    return dict(sorted(_SITES.items()))


def reset() -> None:
    """Set every count to zero. Device counters keep their storage: a captured CUDA graph points to it."""
    for entry in _SITES.values():
        entry.sparse = entry.dense = entry.active = entry.seen = 0
        for tensor in entry.on_device.values():
            tensor.zero_()
