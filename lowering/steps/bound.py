"""A step bound to the tensors of one generation: what stays the same from call to call is said once."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from thresher.errors import ThresherError

from .growing import Room
from .operations import TYPES
from .program import Step

_STRIDED = 256  # with a type: strides follow the sizes


class NotAlike(ThresherError):
    """Why what a call brings is not what a step was bound to; nothing has run then."""


class BoundStep:
    """Runs a step over `given`, the values of all placeholders, which the caller replaces before each call.

    Weights must lie where they lay when this was made: whoever calls sees to it. What a step adds one slot to (`Tape.grown`)
    grows in place; its result is a view of memory with room behind, and the caller puts it where the input was.
    For one thread.
    """

    def __init__(self, step: Step, given: list[Any], inputs: int, most: int | None = None):
        """inputs: how many of the values are no weights. most: slots that rows may come to have. Raises ThresherError
        where a weight is not laid out in order."""
        self.given, self._step, self._most = given, step, most
        tape = step.tape
        self._pointers = array("Q", [0] * len(tape.external))
        self._fixed: list[torch.Tensor] = []  # kept alive
        self._steady: list[tuple[int, int]] = []  # inputs whose sizes never change
        for index, (kind, what) in enumerate(tape.external[: tape.fixed]):
            tensor = what if kind == "made" else given[what]
            if not tensor.is_contiguous():
                raise ThresherError("A weight is not laid out in order.")
            self._fixed.append(tensor)
            if kind == "place" and what < inputs:
                self._steady.append((index, what))
            self._pointers[index] = tensor.data_ptr()
        step.look(self._fixed)
        place = {what: index for index, what in enumerate(tape.external) if what[0] != "made"}
        grown = {r: p for r, p in tape.grown.items() if ("place", p) in place and ("result", r) in place}
        ends = {("place", p) for p in grown.values()} | {("result", r) for r in grown}
        self._others = [
            (index, kind, what)
            for index, (kind, what) in enumerate(tape.external)
            if index >= tape.fixed and (kind, what) not in ends
        ]
        self._made = [r for r in range(len(tape.made)) if r not in grown]
        self._at: list[int] = []  # where each value's description begins
        self._described = step.fixed[:]
        for index in range(tape.fixed, len(tape.external)):
            kind, what = tape.external[index]
            self._at.append(len(self._described))
            if (kind, what) in ends:
                self._described.extend([0] * 10)
                continue
            tensor = given[what] if kind == "place" else None
            rank = (
                tape.made[what].dim()
                if kind == "result"
                else tape.ranks[what]
                if tensor is None
                else tensor.dim()
            )
            self._described.extend([0] * (2 + rank))
        slots = [(place["place", p], place["result", r]) for r, p in grown.items()]
        self._grown = [
            (r, p, at, end, self._at[at - tape.fixed] + 4, self._at[end - tape.fixed] + 4, Room())
            for (r, p), (at, end) in zip(grown.items(), slots)
        ]

    def __call__(self) -> list[Any]:
        """The graph's results. Raises NotAlike before anything has run, and ThresherError."""
        step, given, described, pointers = self._step, self.given, self._described, self._pointers
        tape = step.tape
        early = tape.prelude.forward(*[given[i] for i in tape.reads])
        shapes = step.rooms(*step.sizes.of(given))
        made: list[Any] = [None] * len(tape.made)
        for r in self._made:
            made[r] = torch.empty(shapes[r], dtype=step.types[r][0])
        sources = {"place": given, "early": early, "result": made}
        for index, what in self._steady:
            tensor = given[what]
            if tensor.shape != self._fixed[index].shape or tensor.dtype != self._fixed[index].dtype:
                raise NotAlike(f"An input is {tensor.dtype} {tuple(tensor.shape)}, and was another.")
            given[what] = tensor = step.ordered(tensor, "place", what)
            pointers[index] = tensor.data_ptr()
        for index, kind, what in self._others:
            tensor = sources[kind][what]
            if not tensor.is_contiguous():
                tensor = step.ordered(tensor, kind, what)
                sources[kind] = list(sources[kind])
                sources[kind][what] = tensor  # kept until the end of the call
            shape = tensor.shape
            pointers[index] = tensor.data_ptr()
            at = self._at[index - tape.fixed]
            described[at : at + 2 + len(shape)] = array("q", (TYPES[tensor.dtype], len(shape), *shape))
        self._grow(made, shapes)
        step.run(pointers, described, early[tape.early :])
        return [what if kind == "known" else sources[kind][what] for kind, what in tape.results]

    def _grow(self, made: list[Any], shapes: Any) -> None:
        given, described = self.given, self._described
        for r, p, at, end, before, after, room in self._grown:
            if room.holds(given[p], self._most):
                self._moved(r, p, at, end, room, shapes[r])
            slots = room.slots
            if slots + 1 != shapes[r][2]:
                raise NotAlike("Layers of a cache hold different numbers of tokens.")
            described[before] = slots
            described[after] = slots + 1
            made[r] = room.next()

    def _moved(self, r: int, p: int, at: int, end: int, room: Room, shape: Any) -> None:
        """Say where an input and its result lie from now on."""
        kind, memory, first = self._step.types[r], room.memory, self._step.tape.fixed
        if memory.dtype != kind[0] or [*memory.shape[:2], room.slots + 1, memory.shape[3]] != list(shape):
            raise NotAlike(
                f"Keys or values are {memory.dtype} {tuple(self.given[p].shape)}, and others of the cache are not."
            )
        one = array("q", (kind[1] + _STRIDED, 4, *memory.shape, *memory.stride()))
        for index in (at, end):
            self._pointers[index] = room.pointer
            begin = self._at[index - first]
            self._described[begin : begin + 10] = one
