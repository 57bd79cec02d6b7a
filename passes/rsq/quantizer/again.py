"""What linears that a model calls several times read at their later calls, gathered before anything is quantised.

A linear is quantised where it is first called, from then on every call computes with its codes. Its Hessian is of the
inputs of all calls: of the first one behind quantised linears, as everywhere, of later ones in the original model,
where every token counts alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from ...structure.recover import LinearSite
from ...tokens.owners import Owners
from ..edits import RotationPlan
from . import scores as rsq_scores
from .hessian import Hessian
from .pieces import Batch, seen_from
from .sweep import Sweep, bind


def gather_again(
    sweep: Sweep, plan: RotationPlan, batches: Sequence[Batch], owners: Owners
) -> dict[fx.Node, Hessian]:
    """The Hessian of later calls, by what the first call reads. Runs each batch once, where there is such a linear."""
    later: dict[fx.Node, set[fx.Node]] = {}
    widths: dict[fx.Node, int] = {}
    for first, others in plan.again.items():
        later.setdefault(first.x, set()).update(s.x for s in others if s.x is not first.x)
        widths[first.x] = first.in_features
    later = {x: nodes for x, nodes in later.items() if nodes}
    if not later:
        return {}
    found = {x: Hessian.empty(widths[x]) for x in later}
    targets = {x for nodes in later.values() for x in nodes}
    for batch in batches:
        values = sweep.run(sweep.start(bind(sweep.program, batch.inputs)), targets)
        for x, nodes in later.items():
            for node in sorted(nodes, key=sweep.order.__getitem__):
                seen = seen_from(owners, node, batch, values[node])
                rows, weights = rsq_scores.rows_of(values[node], None, seen.real)
                found[x].add(rows, weights)
    sweep.forget()
    return found


def of(group: Sequence[LinearSite], gathered: Mapping[fx.Node, Hessian]) -> Hessian | None:
    """What was gathered for a group, once: it is used up."""
    held = gathered.get(group[0].x)
    return None if held is None else Hessian(held.total.clone(), held.tokens)
