"""A matrix of test cases of which a plain run takes a sample, and `pytest --thorough` all."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest


def sampled(plain: Collection[Any], *axes: Sequence[Any]) -> list[Any]:
    """Parameters of every combination of `axes` (of the one axis, its values); those not in `plain` are `thorough`.

    plain: tuples with a value of each axis, or values where there is one axis; each must be a combination, so that a
    misspelt one is an error and not a case that no longer runs.
    """
    cases = list(itertools.product(*axes)) if len(axes) > 1 else list(axes[0])
    lost = [case for case in plain if case not in cases]
    assert not lost, f"no such cases: {lost}"
    return [case if case in plain else _thorough(case, len(axes)) for case in cases]


def _thorough(case: Any, axes: int) -> Any:
    return pytest.param(*(case if axes > 1 else (case,)), marks=pytest.mark.thorough)
