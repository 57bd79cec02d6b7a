"""Compiling where a recipe does nothing, for tests of the reasons: `thresher.compile` raises them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thresher.compiled import Compiled
from thresher.recipe import Recipe
from thresher.strict import compile_strictly


def compile(
    model: Any, example_inputs: Any, recipe: Any = None, *, target: str = "reference", dynamic: bool | None = None,
    **options: Any,
) -> Compiled:  # fmt: skip
    """As `thresher.compile`, and what was not rewritten stands in the report of what comes back."""
    given = example_inputs if isinstance(example_inputs, (Mapping, tuple, list)) else dict(example_inputs)
    chosen = Recipe.of(recipe, **options)
    return compile_strictly(model, given, chosen, target=target, dynamic=dynamic, may_do_nothing=True)
