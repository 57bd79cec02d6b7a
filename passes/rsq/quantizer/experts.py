"""Quantises the experts of a mixture: each matrix by a Hessian of the tokens that were routed to it.

An expert that saw few tokens knows little about its inputs, and its Hessian is singular. It is filled up to as many
tokens as there are inputs, with the layer's mean Hessian where all experts read the same hidden state (gate and up);
where each reads features of its own making (down), with the identity at the layer's mean size, which is rounding
to nearest for an expert that saw nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import fx

from ...structure.experts import ExpertSite
from ...tokens.owners import Owners
from ..config import RSQConfig
from . import checks
from . import codes as rsq_codes
from .hessian import Drift, Hessian, HessianError, factor
from .linears import Made
from .outcome import LinearReport, report
from .pieces import Batch, matrix, real_of
from .ranks import ALONE, Ranks
from .rounding import round_group
from .sweep import Sweep, Values


class ExpertHessians:
    """One Hessian [K, K] an expert, and what all rows together say.

    shared: the experts read one hidden state, so that a feature means the same to all of them.
    """

    def __init__(self, site: ExpertSite, shared: bool):
        self.site, self.shared = site, shared
        self.each = [Hessian.empty(site.in_features) for _ in range(site.count)]
        self._ground: torch.Tensor | None = None

    def add(self, x: torch.Tensor, experts: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        """Add rows x [..., K]. experts: whose each row is, to be expanded to them; None where dimension 0 of x counts
        the experts. weights: of the tokens, in the order of the rows, each for as many rows as a token has."""
        counted = row_weights(x, experts, weights)
        for hessian, (rows, mine) in zip(self.each, by_expert(self.site.count, x, experts, counted)):
            hessian.add(rows, mine)
        self._ground = None

    def matrices(self) -> list[torch.Tensor]:
        """fp64 [K, K] for each expert, filled up where it saw few tokens."""
        return [self.matrix(expert) for expert in range(self.site.count)]

    def matrix(self, expert: int) -> torch.Tensor:
        """The same of one expert."""
        hessian = self.each[expert]
        lacking = self.counted(expert) - hessian.tokens
        if not lacking:
            return hessian.matrix()
        if self._ground is None:
            self._ground = self._mean()
        filled = self._ground * lacking
        if hessian.tokens:
            filled += hessian.matrix() * hessian.tokens
        return filled / self.counted(expert)

    def counted(self, expert: int) -> int:
        """How many tokens an expert's matrix stands for: those it saw, and those it was filled up with."""
        return max(self.each[expert].tokens, self.site.in_features)

    def _mean(self) -> torch.Tensor:
        """What an expert is filled up with, fp64 [K, K]."""
        tokens = sum(h.tokens for h in self.each)
        if not tokens:
            return torch.eye(self.site.in_features, dtype=torch.float64)
        total = torch.zeros_like(self.each[0].total)
        for hessian in self.each:
            total += hessian.total
        everyone = Hessian(total, tokens).matrix()
        size = float(torch.diagonal(everyone).mean())
        if self.shared and size:
            return everyone
        return torch.eye(len(everyone), dtype=everyone.dtype) * (size or 1.0)


def row_weights(
    x: torch.Tensor, experts: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor | None:
    """fp32 [...] for rows x [..., K]: the weight of each row's token, 0 where the row is no token of its expert's; None
    for 1 everywhere. Weights that do not come out even over the rows count as none."""
    lead = x.shape[:-1]
    rows = lead.numel() if experts is not None else lead[1:].numel()
    spread = None
    if weights is not None and weights.numel() and rows % weights.numel() == 0:
        spread = weights.flatten().float().repeat_interleave(rows // weights.numel())
    if experts is not None:
        return None if spread is None else spread.reshape(lead)
    used = (x != 0).any(-1).float()  # a token that was not routed here comes as zeros
    return used if spread is None else used * spread.reshape(lead[1:])


def by_expert(
    count: int, x: torch.Tensor, experts: torch.Tensor | None, weights: torch.Tensor | None
) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
    """(rows [n, K], their weights [n] or None) of each expert in turn; the arguments are as in `row_weights`."""
    rows = x.reshape(-1, x.shape[-1])
    flat = None if weights is None else weights.reshape(-1)
    if experts is None:
        which = torch.arange(count, device=x.device).repeat_interleave(len(rows) // count)
    else:
        which = experts.expand(x.shape[:-1]).reshape(-1)
    for expert in range(count):
        mine = (which == expert).nonzero()[:, 0]
        yield rows[mine], None if flat is None else flat[mine]


def reads_shared(sweep: Sweep, sites: Sequence[ExpertSite], site: ExpertSite) -> bool:
    """Whether a product reads the mixture's hidden state, and not what another product by the same experts made."""
    behind = set(sweep.needed([site.x], {}))
    return not any(s.node in behind and s.same_experts(site) for s in sites)


class ExpertGroup:
    """One product by experts, as `LinearGroup` is for linears. shared: see `ExpertHessians`."""

    def __init__(
        self, site: ExpertSite, owners: Owners, config: RSQConfig, shared: bool, ranks: Ranks = ALONE
    ):
        self.site, self.owners, self.config, self.ranks = site, owners, config, ranks
        self.names = site.fqn
        self.hessians = ExpertHessians(site, shared)
        self.drifts: list[Drift] | None = None
        if config.follow_original:
            self.drifts = [Drift.empty(site.in_features) for _ in range(site.count)]

    def _chosen(self, values: Values) -> torch.Tensor | None:
        return values[self.site.experts] if isinstance(self.site.experts, fx.Node) else None

    def finite(self, values: Values, batch: Batch) -> bool:
        """Whether a batch reaches these experts as numbers, apart from its pads."""
        x = values[self.site.x]
        return checks.finite(
            x, row_weights(x, self._chosen(values), real_of(self.owners, self.site.x, batch))
        )

    def add(self, values: Values, plain: Values, weights: torch.Tensor | None, batch: Batch) -> None:
        """Add a batch. plain: of the original model, where it is followed. weights: of the tokens, None for all alike."""
        x, chosen = values[self.site.x], self._chosen(values)
        weights = real_of(self.owners, self.site.x, batch) if weights is None else weights
        self.hessians.add(x, chosen, weights)
        if self.drifts is None:
            return
        # A row says how far the input has drifted only where the original routes its token to the same expert.
        original, other = plain[self.site.x], self._chosen(plain)
        both = (original != 0).any(-1) if other is None or chosen is None else chosen == other
        counted = row_weights(x, chosen, weights)
        same = both.expand(x.shape[:-1]).float()
        counted = same if counted is None else counted * same
        now = by_expert(self.site.count, x, chosen, counted)
        then = by_expert(self.site.count, original, chosen, None)
        for drift, (rows, mine), (before, _) in zip(self.drifts, now, then):
            drift.add(before, rows, mine)

    def quantise(self, sweep: Sweep, bits: int) -> tuple[Made, list[LinearReport]]:
        """Stacked codes, and one report for all experts. Raises HessianError, naming the expert."""
        sweep.forget()
        weight = sweep.weight(self.site.weight)
        for hessian in self.hessians.each:
            hessian.put_together(self.ranks)
        for drift in self.drifts or ():
            self.ranks.sum(drift.total)
        drifts = None
        if self.drifts is not None:
            drifts = [(d, self.hessians.counted(e)) for e, d in enumerate(self.drifts)]
        tensors, found = quantise(
            self.site, weight, self.hessians.matrix, self.config, bits, drifts, self.ranks
        )
        return {self.site.fqn: tensors}, [found]


def quantise(
    site: ExpertSite,
    weight: torch.Tensor,
    hessians: Callable[[int], torch.Tensor],
    config: RSQConfig,
    bits: int,
    drifts: Sequence[tuple[Drift, int]] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, torch.Tensor], LinearReport]:
    """Codes of all experts, stacked as the operators take them, and how far they are from the weights.

    weight: as the model stores it, [experts, out, in] or [experts, in, out]. hessians: an expert's, fp64 [K, K]. drifts:
    with how many tokens each one's Hessian counts, to follow the original's outputs. The report's errors are means over
    the experts. ranks: round some of the experts each.
    """
    made = ranks.together(lambda: _some(site, weight, hessians, config, bits, drifts, ranks))
    parts, reports = zip(*ranks.interleaved(made))
    stacked = {
        n: torch.stack([p[n] for p in parts]) if n in rsq_codes.STACKED else t for n, t in parts[0].items()
    }
    count = len(reports)
    return stacked, LinearReport(
        site.fqn,
        sum(r.bits for r in reports) / count,
        sum(r.nearest for r in reports) / count,
        sum(r.quantized for r in reports) / count,
        max(r.damping for r in reports),
        sum(r.bytes_before for r in reports),
        sum(r.bytes_after for r in reports),
    )


def _some(
    site: ExpertSite,
    weight: torch.Tensor,
    hessians: Callable[[int], torch.Tensor],
    config: RSQConfig,
    bits: int,
    drifts: Sequence[tuple[Drift, int]] | None,
    ranks: Ranks,
) -> list[tuple[dict[str, torch.Tensor], LinearReport]]:
    """Codes and report of each expert of this rank's."""
    made = []
    grid = rsq_codes.make_grid(config, bits)
    for expert in ranks.share(range(site.count)):
        mine, hessian = matrix(site, weight[expert]).float(), hessians(expert)
        try:
            factored = factor(hessian, config.damping, config.activation_order)
        except HessianError as reason:
            raise HessianError(f"expert {expert}: {reason}") from None
        correction = None
        if drifts is not None:
            drift, tokens = drifts[expert]
            correction = drift.correction(factored, tokens).mul_(config.follow_original)
        (found,) = round_group([mine], factored, grid, config, correction)
        tensors = rsq_codes.to_tensors(found, config, bits)
        size = weight.element_size()
        made.append((tensors, report(site.fqn, found, hessian, factored.damping, tensors, config, size)))
    return made
