"""What the sparse MLP operators did, by site: calls sparse and dense, and how many neurons were on.

A site is the name that the rewrite gave to one MLP. Counts are kept as plain numbers on CPU; on a
GPU the active neurons are added up in a device tensor by the kernels themselves, and read only
when somebody asks, so that a call never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class SiteCount:
    """Counts of one site since the last `reset`."""

    sparse: int = 0
    dense: int = 0
    active: int = 0  # neurons in the unions, over the calls in which they were counted
    seen: int = 0  # neurons there were, over the same calls
    on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def device_active(self, device: torch.device) -> torch.Tensor:
        """int64 [1] on `device`, to which a kernel adds its union's size."""
        if device not in self.on_device:
            self.on_device[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self.on_device[device]

    @property
    def union_density(self) -> float | None:
        """Mean share of neurons that a call's tokens kept, or None before the first counted call."""
        active = self.active + sum(int(t.item()) for t in self.on_device.values())
        return active / self.seen if self.seen else None


_SITES: dict[str, SiteCount] = {}


def site(name: str) -> SiteCount:
    """The counts of the site of that name, new if need be."""
    return _SITES.setdefault(name, SiteCount())


def count(name: str, neurons: int, active: int | None) -> None:
    """Count one call: `active` neurons in the union, or None when the call went to the dense kernel."""
    if not name:
        return
    entry = site(name)
    if active is None:
        entry.dense += 1
    else:
        entry.sparse += 1
        entry.active += active
        entry.seen += neurons


def all_sites() -> dict[str, SiteCount]:
    """Every site counted so far, by name."""
    return dict(sorted(_SITES.items()))


def reset() -> None:
    """Set every count to zero. Device counters keep their storage: a captured CUDA graph points to it."""
    for entry in _SITES.values():
        entry.sparse = entry.dense = entry.active = entry.seen = 0
        for tensor in entry.on_device.values():
            tensor.zero_()
