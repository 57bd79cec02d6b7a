"""One group of linears that read one input: what the calibration batches say of it, and their codes by that."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thresher.errors import ThresherError

from ...structure.recover import LinearSite
from ...tokens.owners import Owners
from ..config import RSQConfig
from . import checks
from . import codes as rsq_codes
from . import scores as rsq_scores
from .hessian import Drift, Hessian, factor
from .outcome import LinearReport, report
from .pieces import Batch, seen_from
from .ranks import ALONE, Ranks
from .rounding import round_group
from .sweep import Sweep, Values

Made = dict[str, dict[str, torch.Tensor]]


class LinearGroup:
    """See the module's docstring. The Hessian [K, K] is gathered batch by batch, and used up by `quantise`."""

    def __init__(
        self,
        sites: Sequence[LinearSite],
        owners: Owners,
        config: RSQConfig,
        ranks: Ranks = ALONE,
        again: Hessian | None = None,
    ):
        """again: of the inputs of the linears' later calls."""
        self.sites, self.owners, self.config, self.ranks = sites, owners, config, ranks
        self.x = sites[0].x
        self.names = ", ".join(s.fqn for s in sites)
        self.hessian = Hessian.empty(sites[0].in_features) if again is None else again
        self.drift = None
        if config.follow_original:
            self.drift = Drift.empty(sites[0].in_features)

    def finite(self, values: Values, batch: Batch) -> bool:
        """Whether a batch reaches these linears as numbers, apart from its pads."""
        batch = seen_from(self.owners, self.x, batch, values[self.x])
        return checks.finite(*rsq_scores.rows_of(values[self.x], None, batch.real))

    def add(self, values: Values, plain: Values, weights: torch.Tensor | None, batch: Batch) -> None:
        """Add a batch. plain: of the original model, where it is followed. weights: of the tokens, None for all alike."""
        batch = seen_from(self.owners, self.x, batch, values[self.x])
        rows, weights = rsq_scores.rows_of(values[self.x], weights, batch.real)
        self.hessian.add(rows, weights)
        if self.drift is not None:
            self.drift.add(plain[self.x], rows, weights)

    def quantise(self, sweep: Sweep, bits: int) -> tuple[Made, list[LinearReport]]:
        """Codes by linear, and how far each is from the original. Raises HessianError, and ThresherError for weights
        that are no numbers."""
        config = self.config
        self.hessian.put_together(self.ranks)
        if self.drift is not None:
            self.ranks.sum(self.drift.total)
        factored = self.ranks.together(
            lambda: factor(self.hessian.matrix(), config.damping, config.activation_order, consume=True)
        )
        sweep.forget()
        weights = [sweep.weight(s.weight) for s in self.sites]
        if not all(bool(torch.isfinite(w).all()) for w in weights):
            raise ThresherError(f"{self.names}: the weights are NaN or infinite after rotation.")
        grid = rsq_codes.make_grid(config, bits)
        damping, correction = factored.damping, None
        if self.drift is not None:
            correction = self.drift.correction(factored, self.hessian.tokens).mul_(config.follow_original)
        rounded = round_group(weights, factored, grid, config, correction, self.ranks)
        del weights, factored, correction
        made, reports = {}, []
        for site, found in zip(self.sites, rounded, strict=True):
            tensors = made[site.fqn] = rsq_codes.to_tensors(found, config, bits)
            size = sweep.program.weights[site.weight].tensor.element_size()
            whole = self.hessian.whole()
            reports.append(report(site.fqn, found, whole, damping, tensors, config, size))
        return made, reports
