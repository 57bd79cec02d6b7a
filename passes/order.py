"""In which order passes run: ours by the catalog, others by what they name in `before` and `after`."""

from __future__ import annotations

import itertools

from thresher.errors import ArgumentError
from thresher.recipe import PassConfig, Recipe

from .base import PASSES
from .catalog import PASS_MODULES


def all_passes() -> list[str]:
    """The names of all registered passes in the order in which they run.

    Ours run as PASS_MODULES has them. Another pass stands in front of those it names in `before`, else at the end.
    Raises ArgumentError where what passes ask for in `before` and `after` cannot be had together.
    """
    chain = [name for name in PASS_MODULES if name in PASSES]
    first: dict[str, set[str]] = {name: {n for n in PASSES[name].after if n in PASSES} for name in PASSES}
    for name, one in PASSES.items():
        for later in one.before:
            if later in PASSES:
                first[later].add(name)
    for earlier, later in itertools.pairwise(chain):
        first[later].add(earlier)
    found: list[str] = []

    def place(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            circle = (*waiting[waiting.index(name) :], name)
            raise ArgumentError(
                "the order of passes",
                ", which comes behind ".join(circle),
                "passes whose `before` and `after` can be had together",
                "Name fewer passes there: PASS_MODULES in thresher.passes.catalog has the order of ours.",
            )
        if name not in found:
            for earlier in sorted(first[name]):
                place(earlier, (*waiting, name))
            found.append(name)

    for name in [*chain, *sorted(PASSES)]:
        place(name, ())
    return found


def ordered(recipe: Recipe) -> list[PassConfig]:
    """A recipe's passes in the order in which they run; raises ArgumentError when two cannot be combined."""
    names = [c.name for c in recipe.passes]
    for name in names:
        if name not in PASSES:
            raise ArgumentError(
                "recipe", repr(name), f"one of {', '.join(sorted(PASSES))}", "Import the module that has it."
            )
        for other, reason in PASSES[name].conflicts.items():
            if other in names:
                raise ArgumentError("recipe", f"{name} with {other}", "passes that can be combined", reason)
    places = {name: place for place, name in enumerate(all_passes())}
    return sorted(recipe.passes, key=lambda c: places[c.name])
