"""How dense a model's MLPs are on real text: `thresher.activation_density`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ThresherError
from .mlp_sites import Watch, mlps


@dataclass
class Density:
    """How dense one MLP's activations are at real tokens: shares of neurons, 0 to 1.

    exact: nonzero. above: |h| over each threshold. union: nonzero for any of so many unrelated tokens.
    """

    tokens: int
    exact: float
    above: dict[float, float] = field(default_factory=dict)
    union: dict[int, float] = field(default_factory=dict)


def activation_density(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    thresholds: Sequence[float] = (),
    unions: Sequence[int] = (4, 16),
    example_inputs: Mapping[str, Any] | None = None,
) -> dict[str, Density]:
    """Measure the MLPs' density over batches, by MLP; the model runs in its present mode without gradients.

    thresholds: also report the share of |h| above these. unions: also report, for groups of so many real tokens
    drawn at random from a batch (decoding serves unrelated sequences together), the share on for any of them.
    """
    counts: dict[str, dict[Any, list[float]]] = {}
    random = torch.Generator().manual_seed(0)

    def see(site: str, h: torch.Tensor, real: torch.Tensor | None) -> None:
        rows = h.detach()[real] if real is not None else h.detach().reshape(-1, h.shape[-1])
        sums = counts.setdefault(site, {})

        def add(key: Any, on: torch.Tensor) -> None:
            entry = sums.setdefault(key, [0.0, 0.0])
            entry[0] += float(on.float().sum())
            entry[1] += on.numel()

        on = ~(rows == 0)  # a NaN is on
        add("exact", on)
        sums.setdefault("tokens", [0.0, 1.0])[0] += len(rows)
        for t in thresholds:
            add(("above", t), ~(rows.abs() <= t))
        shuffled = on[torch.randperm(len(on), generator=random).to(on.device)]
        for k in unions:
            groups = len(on) // k
            add(("union", k), shuffled[: groups * k].view(groups, k, -1).any(1))

    if example_inputs is None and not hasattr(model, "dummy_inputs"):
        batches = list(batches)
        example_inputs = batches[0] if batches else None
    watch = Watch(model, mlps(model, example_inputs), see)
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        watch.remove()
    if not counts:
        raise ThresherError("There was not a single batch to measure density on.")
    return {site: _shares(sums) for site, sums in counts.items()}


def _shares(sums: dict[Any, list[float]]) -> Density:
    def share(key: Any) -> float:
        return sums[key][0] / sums[key][1] if sums[key][1] else float("nan")

    found = Density(int(sums["tokens"][0]), share("exact"))
    for key in sums:
        if isinstance(key, tuple):
            (found.above if key[0] == "above" else found.union)[key[1]] = share(key)
    return found
