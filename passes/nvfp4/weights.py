"""Weights in NVFP4 as the program holds them: codes and scales, computed anew when their source changes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from thresher.graph.program import Weight
from thresher.graph.stamp import Stamp, stamp

PARTS = ("codes", "block_scales", "global_scale")


def packed_weights(held: Weight, pack: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> list[Weight]:
    """Codes, block scales and tensor scale of a weight as `pack` gives them, to be recomputed from what it came from.

    A weight that another pass computed is followed back to the model's; where that one cannot be recomputed,
    neither can these.
    """
    again = held.then(pack)
    shared = None if again is None else _Shared(again)
    return [
        Weight(
            f"{held.fqn}.nvfp4_{part}",
            tensor,
            held.origins,
            None if shared is None else shared.part(i),
            held.origin_tensors,
        )
        for i, (part, tensor) in enumerate(zip(PARTS, pack(held.tensor)))
    ]


class _Shared:
    """Three tensors that are computed together and asked for one by one, once each."""

    def __init__(self, make: Callable[..., tuple[torch.Tensor, ...]]):
        self._make = make
        self._lock = threading.Lock()
        self._left: dict[int, torch.Tensor] = {}
        self._sources: tuple[Stamp, ...] = ()

    def part(self, index: int) -> Callable[..., torch.Tensor]:
        return lambda *sources: self._take(index, sources)

    def _take(self, index: int, sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
        now = tuple(map(stamp, sources))
        with self._lock:
            if now != self._sources or index not in self._left:
                self._left, self._sources = dict(enumerate(self._make(*sources))), now
            return self._left.pop(index)
