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
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher.errors import StaleWeightsError
from thresher.graph.program import Program, Weight
from thresher.graph.stamp import Sample, stamp

SHARE = 0.005
"""Of the time since a program was made, how much may go into looking at samples."""


class _Made:
    """A weight computed from others. stamps: of those at the time; () equals none. sources: held, so that their ids are not
    used again; one that is aside holds none, and is forgotten with them."""

    __slots__ = ("ends", "samples", "sources", "stamps", "tensor")

    def __init__(
        self, tensor: Any, stamps: tuple[Any, ...], sources: Sequence[torch.Tensor], samples: list[Sample]
    ):
        self.tensor, self.stamps, self.samples = tensor, stamps, samples
        self.sources: tuple[torch.Tensor, ...] = tuple(sources)
        self.ends: list[Any] = []

    def changed(self) -> bool:
        """Whether a source's samples differ; it is stale from then on."""
        found = any([sample.changed() for sample in self.samples])
        if found:
            self.stamps = ()
        return found


class Freshness:
    """The derived weights of a program, and the state of their sources when they were computed.

    One graph may be called with one module's weights after another's, as Dynamo has it of a loop over experts: what was
    computed from each is kept as long as its sources live.
    """

    def __init__(self, program: Program, mode: str = "check"):
        self.mode = mode
        self._weights = program.weights
        self._lock = threading.Lock()
        self._derived = [n for n, w in program.weights.items() if w.source]
        self._now = {n: self._made(w.tensor, w.made_from) for n, w in program.weights.items() if w.source}
        self._aside: dict[str, dict[tuple[int, ...], _Made]] = {n: {} for n in self._derived}
        self._began, self._spent, self._turn, self._due = time.perf_counter(), 0.0, 0, 0.0

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
        if self.mode == "sample" and time.perf_counter() >= self._due:
            self._look()
        for name in names:
            weight = self._weights[name]
            if not weight.source:
                result.append(live.get(weight.fqn, weight.tensor))
                continue
            made = self._now[name]  # read once: another thread may call with other weights
            if self.mode != "trust":
                now = seen.get(weight.source)
                if now is None:
                    now = seen[weight.source] = tuple([stamp(live[f]) for f in weight.source if f in live])
                if now and now != made.stamps:
                    made, fresh = self._of(name, [live[f] for f in weight.source if f in live], now)
                    repacked += fresh
            result.append(made.tensor)
        return result, repacked

    def due(self) -> bool:
        """Whether samples are to be looked at, which `tensors` does."""
        return self.mode == "sample" and bool(self._derived) and time.perf_counter() >= self._due

    def sources(self, names: Sequence[str], live: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The tensors whose writes in place make one of these weights stale."""
        if self.mode == "trust":
            return []
        read = dict.fromkeys(fqn for name in names for fqn in self._weights[name].source)
        return [live[fqn] for fqn in read if fqn in live]

    def _of(self, name: str, sources: list[torch.Tensor], now: tuple[Any, ...]) -> tuple[_Made, bool]:
        """A weight of these sources, whose stamps are `now`, and whether it was computed anew."""
        key = tuple(map(id, sources))
        with self._lock:
            old = self._now[name]
            if old.stamps == now:  # another thread was here
                return old, False
            made = self._aside[name].pop(key, None)
            fresh = made is None or made.stamps != now
            if made is None or fresh:
                made = self._computed(self._weights[name], sources, now)
            made.sources, made.ends = tuple(sources), []
            self._put_aside(name, old, key)
            self._now[name] = made
            return made, fresh

    def _computed(self, weight: Weight, sources: list[torch.Tensor], now: tuple[Any, ...]) -> _Made:
        if weight.derive is None:
            raise StaleWeightsError(
                f"{', '.join(weight.source)} changed after compiling, and {weight.fqn} was computed from it with "
                "calibration data that is not at hand. Compile the model again."
            )
        with torch.no_grad():
            return _Made(weight.derive(*sources), now, sources, self._sampled(sources))

    def _put_aside(self, name: str, old: _Made, new: tuple[int, ...]) -> None:
        """Keep what was current for when its own sources come again, unless those are the new one's, changed."""
        key, aside = tuple(map(id, old.sources)), self._aside[name]
        if not key or key == new or not old.stamps:
            return

        def forget(_: Any) -> None:
            aside.pop(key, None)

        old.ends = [weakref.ref(source, forget) for source in old.sources]
        aside[key] = old
        old.sources = ()  # last, since a source that nothing else holds ends here

    def _made(self, tensor: Any, sources: Sequence[torch.Tensor]) -> _Made:
        return _Made(tensor, tuple(map(stamp, sources)), sources, self._sampled(sources))

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
            if self._spent + time.thread_time() - worked > SHARE * (begun - self._began):
                break
        self._spent += time.thread_time() - worked
        self._due = self._began + self._spent / SHARE

    def _stale(self, name: str) -> bool:
        """Whether samples of a weight's sources changed: it is computed anew when it is read."""
        return any([made.changed() for made in (self._now[name], *list(self._aside[name].values()))])
