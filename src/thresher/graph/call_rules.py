"""Decisions that are taken at each call, as data: a file can hold them, and another process take them alike.

@rule("transprune.drops")
def drops(facts, program, *arguments): ...

decide = Rule("transprune.drops", {"bucket": 8})
decide(values, inputs)                             # drops({"bucket": 8}, None, values, inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentError

CALL_RULES: dict[str, Callable[..., Any]] = {}


def rule(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function `(facts, program, *arguments)` under a name. A decorator."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        CALL_RULES[name] = function
        return function

    return add


@dataclass(frozen=True)
class Rule:
    """Calls the function of that name. facts: what JSON can hold. program: a Program the function may run, or None.

    Raises ArgumentError for a name that no module imported so far has registered.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    program: Any = None

    def __post_init__(self) -> None:
        if self.name not in CALL_RULES:
            raise ArgumentError(
                "rule",
                repr(self.name),
                ", ".join(sorted(CALL_RULES)) or "none yet",
                "Load the file with thresher.load.",
            )

    def __call__(self, *arguments: Any) -> Any:
        return CALL_RULES[self.name](self.facts, self.program, *arguments)
