"""A session whose program depends on what a call brings: how many tokens may be left out.

The first program is the one compiled for the example. A call that asks for another is given one of
its own, built once; where too many differ, the call runs dense. Either way it is counted.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from thresher import given_tokens, own_generate
from thresher.errors import ArgumentError
from thresher.graph.call_plan import CallPlan
from thresher.graph.program import Program
from thresher.graph.tracing import compiling
from thresher.lowering.target import Target
from thresher.report import Report

from .session import Session

Choices = dict[str, tuple[int, ...]]
Key = tuple[tuple[str, tuple[int, ...]], ...]
WHOLE: Key = ()  # the program in which nothing is left out
MOST = 16  # programs kept for one captured graph


class CallSession(Session):
    """Runs the program that fits a call. extras: the last call's results beyond the caller's, by name.

    rebuild: a session for other choices, from the inputs of a call that made them; for a choice of None, without
        that pass. kept, whole: where nothing can be rebuilt, the programs for other choices, and the one that
        calls with still others run, said once each in a warning.
    ran: how often each choice was asked for. last: the session whose program the last call ran. keep_inputs: remember
        the last call's as `inputs`, for `rebuild`.
    """

    keep_inputs = False

    def __init__(
        self,
        *args: Any,
        rebuild: Callable[[Mapping[str, Any], Sequence[Any]], Session] | None = None,
        kept: Mapping[Key, Program] | None = None,
        whole: Program | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._kept = {**(kept or {}), **({WHOLE: whole} if whole is not None else {})}
        self.inputs: list[Any] = []
        self._missed: set[Key] = set()
        self._told = False
        self.rebuild = rebuild
        self.plan: CallPlan = self.program.calls
        self.made: Choices = {name: c.made for name, c in self.plan.choices.items()}
        self.variants: dict[Key, Session] = {}
        self.ran: Counter[tuple[int, ...]] = Counter()
        self.extras: dict[str, torch.Tensor] = {}
        self._asked = {
            name: self.plain.lower(c.inputs) if c.inputs is not None else None
            for name, c in self.plan.choices.items()
        }

    @property
    def programs(self) -> int:
        return super().programs + sum(variant.programs for variant in list(self.variants.values()))

    def results(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> list[Any]:
        if self.keep_inputs:
            self.inputs = list(inputs)
        wanted = self.wanted(inputs, weights)
        self.ran[tuple(n for _, value in sorted(wanted.items()) for n in value)] += 1
        self.last: Session = self
        if wanted == self.made:
            return self.run_made(inputs, weights)
        self.last = variant = self._variant(wanted, inputs)
        if isinstance(variant, CallSession):
            results = variant.run_made(inputs, weights)
            self.extras = variant.extras
        else:
            results = variant.results(inputs, weights)
            self.extras = {}
        return results

    def run_made(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> list[Any]:
        """Run this session's own program, whatever the call would choose."""
        results = super().results([*inputs, *self._beside(inputs)], weights)
        count = len(self.plan.extra_outputs)
        if count:
            given = zip(self.plan.extra_outputs, results[-count:])
            self.extras = {
                name: value for name, value in given if value is not None
            }  # None where a call ran padded
            results = results[:-count]
        for index, name in self.plan.published.items():
            given_tokens.publish(results[index], self.extras[name])
        for index, short in self.plan.shortened.items():
            given_tokens.note(results[index], kept=self.extras[short.kept])
        self._check_spare_places(results)
        for index, name in self.plan.scored.items():
            if name in self.extras:
                given_tokens.note(results[index], scores=self.extras[name])
        if self.plan.scored and not (self._told or given_tokens.kept_is_read()) and own_generate.running():
            self._told = True
            warnings.warn(own_generate.NOT_ROUNDED, stacklevel=3)
        return results

    def _beside(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """What the program takes beyond the caller's inputs."""
        if not self.plan.extra_inputs:
            return []
        known = {**given_tokens.known(inputs), given_tokens.ASKING: given_tokens.asked()}
        missing = [name for name in self.plan.extra_inputs if known.get(name) is None]
        if missing:
            raise ArgumentError(
                missing[0],
                "nothing",
                "what the call with which this program was made had",
                "Call within thresher.token_types(types, scores); a user's turn is told by a model of thresher.compile.",
            )
        return [known[name] for name in self.plan.extra_inputs]  # type: ignore[misc]

    def _check_spare_places(self, results: Sequence[Any]) -> None:
        """Keys and values with fewer tokens, or with places of none, are only for callers who know of them: raise where
        transformers' own `generate` would misread them, and warn other callers once."""
        caches = {short.kept for i, short in self.plan.shortened.items() if results[i].dim() == 4}
        if given_tokens.kept_is_read() or not caches:
            return
        uneven = any(bool((self.extras[n] < 0).any()) for n in caches)
        if own_generate.refuse(uneven) or self._told or not uneven:
            return
        self._told = True
        warnings.warn(
            "The rows of this call keep different numbers of tokens, so that the keys and values handed back have unused "
            "places, which transformers' own decoding would read as tokens. Generate with fast.generate(...) of "
            "thresher.compile, whose cache skips them, or pass use_cache=False.",
            stacklevel=3,
        )

    def wanted(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> Choices:
        """What each pass would choose for a call."""
        found: Choices = {}
        for name, choice in self.plan.choices.items():
            lowered = self._asked[name]
            values: list[Any] = []
            if lowered is not None and choice.inputs is not None:
                held = [choice.inputs.weights[n] for n in lowered.weights]
                values = lowered.run(inputs, [weights.get(w.fqn, w.tensor) for w in held])
            found[name] = choice.decide(values, inputs)
        return found

    def whole(self, inputs: Sequence[Any]) -> Session:
        """The session in which the passes that look at calls leave nothing out. inputs: of some call."""
        return self._made(WHOLE, dict.fromkeys(self.made), inputs)

    def _variant(self, wanted: Choices, inputs: Sequence[Any]) -> Session:
        key: Key = tuple(sorted(wanted.items()))
        with self._lock:
            if key in self.variants:
                return self.variants[key]
        with compiling(), self._lock:
            if key in self.variants:
                return self.variants[key]
            if self.rebuild is None and key not in self._kept:
                if key not in self._missed:
                    self._missed.add(key)
                    warnings.warn(
                        f"This call asks for {wanted}, and the file has no program for that: it runs without leaving "
                        "tokens out. Call the model with such inputs before it is saved.",
                        stacklevel=3,
                    )
                return self.whole(inputs)
            if len(self.variants) >= MOST - 1:
                return self.whole(inputs)
            return self._made(key, wanted, inputs)

    def _made(self, key: Key, wanted: Mapping[str, Any], inputs: Sequence[Any]) -> Session:
        with compiling(), self._lock:
            if key not in self.variants:
                if self.rebuild is not None:
                    self.variants[key] = self.rebuild(wanted, inputs)
                else:
                    program = self._kept[key]
                    kind = CallSession if program.calls is not None else Session
                    self.variants[key] = kind(program, self.target, self.plain, self.report, self._mode)
                self.counters.lowered += 1
            return self.variants[key]


def built(program: Program, plain: Target, report: Report) -> Session:
    """A session that runs a program through one target, as it was built."""
    kind = Session if program.calls is None else CallSession
    session = kind(program, plain, plain, report)
    session.pads_unsaid()  # what it is given are batches that a judge made up
    return session


def run_built(session: Session, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """A program's results and extras on a caller's inputs, as it was built, whatever the call would choose; nobody
    continues from them."""
    if not isinstance(session, CallSession):
        return session.results(inputs, {}), {}
    with given_tokens.reading_kept():
        return session.run_made(inputs, {}), session.extras
