"""Finds experts: products of rows by matrices of which the model stores several in one weight [experts, ...].

    expert_linear(x [..., in], W, experts [...])        each row by the matrix of its own expert (see graph.routed)
    bmm(x [experts, tokens, in], W)                     every expert on rows of its own (Llama 4)
    linear(x, W[i])                                     one expert by its number (loops)

Also which linear routes: the one with a result for each expert, from which the highest are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from thresher.graph.nodes import argument, value
from thresher.graph.program import Program, Weight

from .pattern import CASTS
from .sites import LinearSite

aten = torch.ops.aten

_TURNS = (aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_CHOOSES = (aten.topk.default, aten.sort.default, aten.argsort.default, aten.argmax.default, aten.max.dim)


@dataclass(eq=False)
class ExpertSite:
    """One product by the experts' matrices of one weight.

    fqn: the weight's name. node: the operator, whose result [..., out_features] is `output`. x: [..., in_features].
    weight: attribute name of the stored [experts, out, in], or [experts, in, out] where `transposed`.
    experts: whose matrix each row is multiplied by, int, expanded to x's rows; a number for one expert alone; None
        where the first dimension of x counts the experts.
    """

    fqn: str
    node: fx.Node
    x: fx.Node
    weight: str
    transposed: bool
    experts: fx.Node | int | None
    count: int
    in_features: int
    out_features: int

    @property
    def output(self) -> fx.Node:
        return self.node

    def same_experts(self, other: ExpertSite) -> bool:
        """Whether both multiply the rows of one choice of experts, as the products of one mixture do."""
        chosen = isinstance(self.experts, fx.Node) and self.experts is other.experts
        return chosen or self.fqn.rpartition(".")[0] == other.fqn.rpartition(".")[0]


def find_experts(program: Program) -> list[ExpertSite]:
    """Every product by experts' matrices that the model stores, in graph order."""
    found = [_read(program, node) for node in program.nodes()]
    return [s for s in found if s is not None]


def by_weight(sites: Sequence[ExpertSite]) -> list[tuple[ExpertSite, ...]]:
    """Sites that multiply by one weight's matrices together, in graph order."""
    found: dict[tuple[str, bool], list[ExpertSite]] = {}
    for site in sites:
        found.setdefault((site.weight, site.transposed), []).append(site)
    return [tuple(group) for group in found.values()]


def rows_of(program: Program, site: ExpertSite) -> fx.Node:
    """The experts of a site's rows as a node: int64, to be expanded to them."""
    if isinstance(site.experts, fx.Node):
        return site.experts
    device = value(site.x).device
    if site.experts is None:
        lead = [1] * (value(site.x).dim() - 2)
        numbers = torch.arange(site.count, device=device).reshape(-1, *lead)
    else:
        numbers = torch.tensor(site.experts, device=device)
    return program.get_weight(Weight(f"constant.{site.fqn}.numbers", numbers), site.node)


def _read(program: Program, node: fx.Node) -> ExpertSite | None:
    if str(node.target) == "thresher.expert_linear.default":
        x, factor, experts = node.args
        return _site(program, node, x, factor, experts, False)  # type: ignore[arg-type]
    if node.target is aten.bmm.default:
        x, factor = node.args
        return _site(program, node, x, factor, None, True)  # type: ignore[arg-type]
    if node.target in (aten.linear.default, aten.mm.default, aten.matmul.default) and len(node.args) == 2:
        x, factor = node.args
        flips = node.target is not aten.linear.default
        while isinstance(factor, fx.Node) and (
            factor.target in (aten.t.default, *_TURNS) or factor.target in CASTS
        ):
            if factor.target not in CASTS:
                flips = not flips
            factor = factor.args[0]
        if not isinstance(factor, fx.Node) or factor.target is not aten.select.int or factor.args[1] != 0:
            return None
        number = factor.args[2]
        return _site(program, node, x, factor.args[0], number, flips) if isinstance(number, int) else None  # type: ignore[arg-type]
    return None


def _site(
    program: Program, node: fx.Node, x: fx.Node, factor: fx.Node, experts: fx.Node | int | None, flipped: bool
) -> ExpertSite | None:
    """flipped: the operator reads [experts, in, out]."""
    stored = factor
    while isinstance(stored, fx.Node) and stored.op == "call_function":
        if _turns_matrices(stored):
            flipped = not flipped
        elif stored.target not in CASTS:
            return None
        stored = stored.args[0]  # type: ignore[assignment]
    held = program.weight(stored)
    if held is None or held.tensor.dim() != 3 or held.fqn.startswith("constant."):
        return None
    count, rows, columns = held.tensor.shape
    if flipped:
        rows, columns = columns, rows
    return ExpertSite(held.fqn, node, x, str(stored.target), flipped, experts, count, columns, rows)


def _turns_matrices(node: fx.Node) -> bool:
    """Whether a node swaps the last two of three dimensions."""
    if node.target is aten.transpose.int:
        turned = {argument(node, d) % 3 for d in ("dim0", "dim1")}
        return turned == {1, 2} and value(node).dim() == 3
    return node.target is aten.permute.default and [d % 3 for d in node.args[1]] == [0, 2, 1]  # type: ignore[union-attr, operator]


def mark_routers(linears: Sequence[LinearSite], experts: Sequence[ExpertSite]) -> None:
    """Give the linears that choose experts the role "router"."""
    counts = {s.count for s in experts}
    for site in linears:
        if not site.role and site.out_features in counts and _is_chosen_from(site.output):
            site.role = "router"


def _is_chosen_from(scores: fx.Node) -> bool:
    """Whether the highest of these are taken, behind what is computed element by element or along them."""
    stack, seen = [scores], {scores}
    while stack and len(seen) < 40:
        for user in stack.pop().users:
            if user.target in _CHOOSES:
                return True
            known = value(user)
            if (
                user not in seen
                and isinstance(known, torch.Tensor)
                and known.numel()
                and user.op == "call_function"
            ):
                seen.add(user)
                stack.append(user)
    return False
