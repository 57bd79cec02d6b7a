"""Keeps what runs equal to the model's live weights.

A model's own weights are passed to the compiled code at every call, so replacing or editing one needs
nothing more. A weight computed from others (packed codes, say) is checked against the tensors it was
computed from: another stamp (`thresher.graph.stamp`) means it is stale, and it is computed anew.
Writes through `p.data.copy_(...)` leave no trace. In the mode "sample" some values of each source are therefore
compared now and then (`stamp.Sample`), in so far as that takes no more than SHARE of the time that passes: after a
pause of SHARE's inverse times what a look takes (a second for a thousand weights) the next call looks at all of them.
What a look takes is counted in time of the processor, so that a busy machine does not put off the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher.errors import StaleWeightsError
from thresher.graph.program import Program, Weight
from thresher.graph.stamp import Sample, stamp

SHARE = 0.005
"""Of the time since a program was made, how much may go into looking at samples."""


class Freshness:
    """The derived weights of a program, and the state of their sources when they were computed."""

    def __init__(self, program: Program, mode: str = "check"):
        self.mode = mode
        self._weights = program.weights
        self._current: dict[str, torch.Tensor] = {}
        # holding the sources keeps an id from being used again for another tensor
        self._kept = {name: w.made_from for name, w in program.weights.items()}
        self._stamps: dict[str, tuple[Any, ...]] = {
            n: tuple(map(stamp, kept)) for n, kept in self._kept.items()
        }
        self._lock = threading.Lock()
        self._derived = [n for n, w in program.weights.items() if w.source]
        self._samples = {n: self._sampled(self._kept[n]) for n in self._derived}
        self._made, self._spent, self._turn, self._due = time.perf_counter(), 0.0, 0, 0.0

    def tensors(
        self, names: Sequence[str], live: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], int]:
        """The tensors to run with, by attribute name, and how many were computed anew.

        live: the model's tensors by FQN. Raises StaleWeightsError for a stale weight that cannot be recomputed.
        """
        if not self._derived:  # a decoding step asks for hundreds
            weights = map(self._weights.__getitem__, names)
            return [live.get(w.fqn, w.tensor) for w in weights], 0
        result, repacked = [], 0
        seen: dict[Any, tuple[Any, ...]] = {}  # by sources: a linear's codes and scales have the same
        if self.mode == "sample" and self._derived and time.perf_counter() >= self._due:
            self._look()
        for name in names:
            weight = self._weights[name]
            if not weight.source:
                result.append(live.get(weight.fqn, weight.tensor))
                continue
            if self.mode != "trust":
                now = seen.get(weight.source)
                if now is None:
                    now = seen[weight.source] = tuple([stamp(live[f]) for f in weight.source if f in live])
                if now and now != self._stamps[name]:
                    self._refresh(name, weight, [live[f] for f in weight.source if f in live], now)
                    repacked += 1
            result.append(self._current.get(name, weight.tensor))
        return result, repacked

    def _refresh(self, name: str, weight: Weight, sources: list[torch.Tensor], now: tuple[Any, ...]) -> None:
        """Compute a weight anew from its sources, whose stamps are `now`."""
        with self._lock:
            if weight.derive is None:
                raise StaleWeightsError(
                    f"{', '.join(weight.source)} changed after compiling, and {weight.fqn} was computed from it with "
                    "calibration data that is not at hand. Compile the model again."
                )
            with torch.no_grad():
                self._current[name] = weight.derive(*sources)
            self._stamps[name], self._kept[name] = now, tuple(sources)
            self._samples[name] = self._sampled(sources)

    def _sampled(self, sources: Sequence[torch.Tensor]) -> list[Sample]:
        return [Sample(t) for t in sources] if self.mode == "sample" else []

    def _look(self) -> None:
        """Look at samples, each weight in its turn, for as long as SHARE allows; all at once after a pause.

        One that changed is stale, and then all are looked at: whoever writes through `.data` writes to many.
        """
        begun, worked = time.perf_counter(), time.thread_time()
        for _ in self._derived:
            self._turn = (self._turn + 1) % len(self._derived)
            if self._stale(self._derived[self._turn]):
                for name in self._derived:
                    self._stale(name)
                break
            if self._spent + time.thread_time() - worked > SHARE * (begun - self._made):
                break
        self._spent += time.thread_time() - worked
        self._due = self._made + self._spent / SHARE

    def _stale(self, name: str) -> bool:
        found = any([sample.changed() for sample in self._samples[name]])
        if found:
            self._stamps[name] = ()  # equals no stamp: the weight is computed anew when it is read
        return found
