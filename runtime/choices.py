"""Two programs made to choose alike: what is left of their difference is rounding.

Where a program picks by score (a mixture's experts, the best of several), a rounding decides between two that score nearly
the same, and a token that goes to another expert comes out otherwise altogether, in one program as rightly as in the
other. So the captured program is given the rewritten one's picks. Such a pick must have been open to it: what was left
for it may score no more above than the rounding of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.lowering.target import Target
from thresher.verdict import FACTOR

from .compare import Outcome, outcome

aten = torch.ops.aten
_PICKS = (aten.topk.default, aten.max.dim, aten.argmax.default)


class Choices:
    """What a run of a program picked, by its nodes' names.

    scores: what it picked from. picked: int64, where, along the same dimension; both as the node has them. unlike: a
    pick could not be given to this program, whose tokens are not the other's.
    """

    def __init__(self) -> None:
        self.scores: dict[str, torch.Tensor] = {}
        self.picked: dict[str, torch.Tensor] = {}
        self.dims: dict[str, int] = {}
        self.unlike = False

    def lead(self, name: str) -> torch.Tensor:
        """By how much the best score that a node left stands above the worst that it took, one number for each of its
        choices; negative where it took the best."""
        scores, picked, dim = self.scores[name].double(), self.picked[name], self.dims[name]
        none = float("-inf")
        left = scores.scatter(dim, picked, none).amax(dim)
        return (left - scores.gather(dim, picked).amin(dim)).where(left != none, none)


def run(
    program: Program,
    inputs: Sequence[Any],
    target: Target,
    given: Choices | None = None,
    real: torch.Tensor | None = None,
) -> tuple[Outcome, Choices]:
    """What a program gives, and what it picked; with `given`, what it gives where it picks as another did.

    real: bool [rows, tokens], the tokens the other was run on, where it left the rest out.
    """
    watched, found = program.copy(), Choices()
    for node in watched.graph.nodes:
        if node.op == "call_function" and node.target in _PICKS and _scores(node):
            node.target = _pick(node.target, node.name, found, given, real)
    watched.graph_module.recompile()
    return outcome(watched, inputs, target)[0], found


def alike(
    base: Program,
    after: Program,
    inputs: Sequence[Any],
    targets: tuple[Target, Target],
    real: torch.Tensor | None,
    floor: float,
) -> tuple[Outcome, Outcome, Outcome] | None:
    """What a program gives as written and in the higher precision, both with the rewritten one's picks, and what the
    rewritten one gives as written; None where it picks nothing, or a pick was not open to the program.

    targets: as written, and in the higher precision. real: as in `run`. floor: beside FACTOR times the program's own error
    in its scores, how far the other's may be off, over the largest of them.
    """
    plain, raised = targets
    made, given = run(after, inputs, plain)
    low, own = run(base, inputs, plain, given, real)
    true, exact = run(base, inputs, raised, given, real)
    return (low, true, made) if _all_open(own, exact, given, floor) else None


def _all_open(low: Choices, true: Choices, given: Choices, floor: float) -> bool:
    if low.unlike or true.unlike or not given.picked or set(true.scores) != set(given.scores):
        return False
    for name, scores in true.scores.items():
        exact, own = scores.double(), low.scores[name].double()
        finite = exact.isfinite() & own.isfinite()
        scale = float(exact[finite].abs().max()) if finite.any() else 0.0
        error = float((own - exact)[finite].abs().max()) / max(scale, 1e-30) if finite.any() else 0.0
        if not bool((true.lead(name) <= 2 * scale * (FACTOR * error + floor)).all()):  # nor where it is NaN
            return False
    return True


def _scores(node: torch.fx.Node) -> bool:
    """Whether a node picks from floating-point numbers, along one dimension."""
    known = value(node.args[0])
    if not isinstance(known, torch.Tensor) or not known.is_floating_point() or not known.dim():
        return False
    return node.target is aten.topk.default or (len(node.args) > 1 and isinstance(node.args[1], int))


def _pick(
    target: Any, name: str, found: Choices, given: Choices | None, real: torch.Tensor | None
) -> Callable[..., Any]:
    """The operator, which notes what it picks, or picks as it is told."""
    topk = target is aten.topk.default
    where = 2 if topk else 1  # of the arguments, the dimension

    def pick(scores: torch.Tensor, *rest: Any, **named: Any) -> Any:
        made = target(scores, *rest, **named)
        index = made if isinstance(made, torch.Tensor) else made[1]
        dim = (rest[where - 1] if len(rest) >= where else named.get("dim", -1)) % scores.dim()
        kept = index.dim() == scores.dim()
        picked = index if kept else index.unsqueeze(dim)
        if given is not None:
            picked, told = _as_told(picked, given.picked.get(name), dim, real)
            found.unlike |= not told
        found.scores[name], found.picked[name], found.dims[name] = scores, picked, dim
        index = picked if kept else picked.squeeze(dim)
        if isinstance(made, torch.Tensor):
            return index
        values = scores.gather(dim, picked)
        return (values if kept else values.squeeze(dim)), index

    return pick


def _as_told(
    own: torch.Tensor, told: torch.Tensor | None, dim: int, real: torch.Tensor | None
) -> tuple[torch.Tensor, bool]:
    """Another's picks in the place of a program's own; where the other left tokens out, at those it has."""
    if told is None:
        return own, False
    if told.shape == own.shape:
        return told, True
    if real is None or dim != own.dim() - 1 or told.shape[-1] != own.shape[-1]:
        return own, False
    here, each = real.flatten(), own.numel() // real.numel()  # tokens lead: each has as many picks
    if own.numel() != each * here.numel() or told.numel() != each * int(here.sum()):
        return own, False
    rows = own.reshape(-1, each).clone()
    rows[here] = told.reshape(-1, each)
    return rows.view(own.shape), True
