"""Linears that a model calls several times (ALBERT's layers): one set of codes serves all calls, where all read alike."""

from __future__ import annotations

from typing import Any

from thresher.report import Miss

from .edits import Edit, RotationPlan
from .rotation import Rotation

DIFFER = (
    "It is called in {} places, and the rotations around these differ, so that one set of codes would not serve all: "
    "quantize with rotate=False, rotate_heads=False and rotate_down=False."
)


def settle_shared(plan: RotationPlan) -> None:
    """Take back the linears whose calls are planned to read or write differently, each with a Miss."""
    for first, others in list(plan.again.items()):
        forms = [_form(plan.edit(site)) for site in (first, *others)]
        if any(form != forms[0] for form in forms[1:]):
            del plan.again[first]
            plan.quantise.remove(first)
            plan.missed.append(Miss(first.fqn, DIFFER.format(len(forms))))


def calls(plan: RotationPlan, site: Any) -> tuple[Any, ...]:
    """All calls of a linear that is quantised; of a product by experts it alone."""
    return (site, *plan.again.get(site, ()))


def _form(edit: Edit) -> tuple[object, ...]:
    norm = None if edit.norm is None else (edit.norm.weight, edit.norm.bias, edit.norm.offset)
    rows = None if edit.rows is None else tuple(edit.rows.flatten().tolist())
    turned = (edit.reads, edit.heads_in, edit.online, edit.writes, edit.heads_out)
    return norm, rows, edit.centred, edit.cached, *map(_said, turned)


def _said(r: Rotation | None) -> str | None:
    return None if r is None else r.note  # the order, the construction and the seed, which decide it
