"""A session whose program depends on what a call brings: how many tokens may be left out.

The first program is the one compiled for the example. A call that asks for another is given one of
its own, built once; where too many differ, the call runs dense. Either way it is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from thresher import tokens
from thresher.call_plan import CallPlan
from thresher.program import Program

from .session import Session

Choices = dict[str, tuple[int, ...]]
MOST = 16  # programs kept for one captured graph


class CallSession(Session):
    """Runs the program that fits a call. extras: the last call's results beyond the caller's, by name.

    rebuild: a session for other choices, from the inputs of a call that made them; without it such calls fail.
    ran: how often each choice ran.
    """

    def __init__(
        self, *args: Any, rebuild: Callable[[Choices, Sequence[Any]], Session] | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.rebuild = rebuild
        self.plan: CallPlan = self.program.calls
        self.made: Choices = {name: c.made for name, c in self.plan.choices.items()}
        self.variants: dict[tuple[tuple[str, tuple[int, ...]], ...], Session] = {}
        self.ran: Counter[tuple[int, ...]] = Counter()
        self.extras: dict[str, torch.Tensor] = {}
        self._asked = {
            name: self.plain.lower(c.inputs) if c.inputs is not None else None
            for name, c in self.plan.choices.items()
        }

    def __call__(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> list[Any]:
        wanted = self.wanted(inputs, weights)
        self.ran[tuple(n for _, value in sorted(wanted.items()) for n in value)] += 1
        if wanted == self.made:
            return self.run_made(inputs, weights)
        variant = self._variant(wanted, inputs)
        if isinstance(variant, CallSession):
            results = variant.run_made(inputs, weights)
            self.extras = variant.extras
        else:
            results = variant(inputs, weights)
            self.extras = {}
        return results

    def run_made(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> list[Any]:
        """Run this session's own program, whatever the call would choose."""
        known = tokens.known(inputs) if self.plan.extra_inputs else {}
        results = super().__call__([*inputs, *(known[n] for n in self.plan.extra_inputs)], weights)
        count = len(self.plan.extra_outputs)
        if count:
            given = zip(self.plan.extra_outputs, results[-count:])
            self.extras = {
                name: value for name, value in given if value is not None
            }  # None where a call ran padded
            results = results[:-count]
        for index, name in self.plan.published.items():
            tokens.publish(results[index], self.extras[name])
        for index, short in self.plan.shortened.items():
            tokens.note(results[index], kept=self.extras[short.kept])
        for index, name in self.plan.scored.items():
            if name in self.extras:
                tokens.note(results[index], scores=self.extras[name])
        return results

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

    def _variant(self, wanted: Choices, inputs: Sequence[Any]) -> Session:
        key = tuple(sorted(wanted.items()))
        with self._lock:
            if key not in self.variants:
                if len(self.variants) >= MOST - 1:
                    wanted = {name: (0,) * len(value) for name, value in wanted.items()}
                    key = tuple(sorted(wanted.items()))
                if key not in self.variants:
                    assert self.rebuild is not None
                    self.variants[key] = self.rebuild(wanted, inputs)
                    self.counters.lowered += 1
            return self.variants[key]


def run_built(
    program: Program, inputs: Sequence[Any], plain: Any, report: Any
) -> tuple[list[Any], dict[str, Any]]:
    """A program's results and extras on a caller's inputs, as it was built."""
    if program.calls is None:
        return Session(program, plain, plain, report)(inputs, {}), {}
    session = CallSession(program, plain, plain, report)
    return session.run_made(inputs, {}), session.extras
