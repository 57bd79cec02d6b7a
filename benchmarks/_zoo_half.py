"""Two programs in bf16 where a rounding sends a token to another expert: compared with their picks made alike.

Of a mixture's tokens some score two experts nearly the same, and bf16 decides between them by chance, in the rewritten
program as in eager. Both are right then, and neither is near the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import _zoo_models as models
import torch
from _zoo_ways import Ways, alone, difference, packing, said_of

from thresher.lowering.raised import Raised
from thresher.lowering.reference import Reference
from thresher.runtime import choices
from thresher.runtime.session import Session
from thresher.verdict import FLOOR

HALF = 0.1
"""Largest difference in bf16 from eager in bf16; beyond it a row is right where it is no further from fp32 than twice
eager is, or near with its picks made alike."""


def with_picks_alike(session: Session, inputs: Sequence[Any], difference: Any, floor: float) -> float | None:
    """How far a rewritten program is from its captured one where that picks as it did, each pick having been open to it;
    None where it picks nothing, or a pick was not open.

    inputs: the program's. difference: of two lists of results. floor: beside which a score's own rounding is allowed.
    """
    captured, after = session.captured, session.program
    real = inputs[after.packing.mask] != 0 if after.packing is not None else None
    targets = Reference(), Raised(torch.float32)
    found = choices.alike(captured, after, inputs, targets, real, floor)
    if found is None:
        return None
    low, _, made = found
    return float(difference(made.results, low.results))


def in_half(
    model_class: type, config_class: type, given: dict[str, Any], exact: Any
) -> tuple[dict[str, Any], bool]:
    """How far the default recipe in bf16 is from eager in bf16, and whether that is right."""
    half = models.build(model_class, config_class).to(torch.bfloat16)
    at = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    with alone():
        try:
            eager = half(**at)
        except Exception as reason:
            return {"bf16": f"eager fails: {said_of(reason)}"}, True
        ways = Ways(["default"])
        fast = torch.compile(half, backend=ways)
        by_itself = difference(fast(**at), eager, at)
        ways.way = "default"
        got = fast(**at)
    if ways.faults():
        raise RuntimeError(ways.faults()[0])
    error, ours, theirs = (
        difference(got, eager, at),
        difference(got, exact, given),
        difference(eager, exact, given),
    )
    limit = max(HALF, 1.5 * by_itself)
    right = error <= limit or ours <= 2 * theirs
    if not right and len(ways.ran) == 1:
        apart = functools.partial(difference, given=at)
        alike = with_picks_alike(*ways.ran[0], apart, FLOOR[torch.bfloat16])
        right = alike is not None and alike <= limit
    return {"error_bf16": error, **packing_of_half(ways)}, right


def packing_of_half(ways: Ways) -> dict[str, Any]:
    found = packing(ways)
    if found["packed"]:
        return {"packed_bf16": True}
    return {"packed_bf16": False, "prepack_bf16": found["prepack"]}
