"""Training MLPs to be sparse: the density loss of DEFT (arXiv 2402.01911).

    model = thresher.relufy(model)                      # GELU and SiLU are never exactly zero; ReLU is
    density = thresher.density_loss(model, weight=1.0)
    for batch in batches:
        loss = model(**batch).loss + density()          # the penalty of the forward pass just run
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    density.remove()
    print(thresher.activation_density(model, held_out))

The penalty of one MLP is mean(h^2 / (h^2 + eps)) over real tokens and neurons, h being what the down
projection reads (for gated MLPs the product): a smooth count of nonzero activations. Pad tokens
count neither in the loss nor in the metrics (`density_metrics.py`). `mlp_sites.py` finds the MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, ThresherError
from .mlp_sites import Mlp, Watch, mlps

EPS = 1e-2


class DensityLoss(nn.Module):
    """The penalty to add to a task's loss. Call it after the model's forward pass; see `density_loss`."""

    def __init__(self, model: nn.Module, sites: list[Mlp], eps: float, weight: float, layers: Any):
        super().__init__()
        self.layers: torch.Tensor
        self.sites, self.eps, self.weight = sites, eps, weight
        self._learned = layers == "learned"
        if self._learned:
            device = next(model.parameters()).device
            self.logits = nn.Parameter(torch.zeros(len(sites), device=device))
        else:
            self.register_buffer("layers", torch.as_tensor(layers, dtype=torch.float32), persistent=False)
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._watch = Watch(model, sites, self._see)
        self._watch.begin = self._terms.clear  # type: ignore[method-assign]

    def _see(self, site: str, h: torch.Tensor, real: torch.Tensor | None) -> None:
        self._terms.setdefault(site, []).append(soft_density(h, real, self.eps))

    def layer_weights(self) -> torch.Tensor:
        """What each MLP's term counts, fp32 [sites], their mean being 1."""
        if self._learned:
            return self.logits.softmax(0) * len(self.sites)
        return self.layers * (len(self.sites) / self.layers.sum())

    def per_layer(self) -> dict[str, float]:
        """The last forward pass's terms before any weight, by MLP."""
        return {s: float(torch.stack(t).detach().mean()) for s, t in self._terms.items()}

    def forward(self) -> torch.Tensor:
        if not self._terms:
            raise ThresherError("The density loss was asked for before a forward pass of its model.")
        weights = self.layer_weights()
        total = None
        for index, site in enumerate(self.sites):
            terms = self._terms.get(site.fqn)
            if terms:
                term = torch.stack(terms).mean() * weights[index].to(terms[0].device)
                total = term if total is None else total + term.to(total.device)
        assert total is not None
        return self.weight * total / len(self.sites)

    def remove(self) -> None:
        """Take the hooks out of the model."""
        self._watch.remove()


def soft_density(h: torch.Tensor, real: torch.Tensor | None, eps: float) -> torch.Tensor:
    """mean(h^2 / (h^2 + eps)) over real tokens and neurons, fp32. h [..., F]; real: bool of its leading shape."""
    squares = h.float().square()
    share = squares / (squares + eps)
    if real is None:
        return share.mean()
    kept = real.to(share.dtype)
    return (share.mean(-1) * kept).sum() / kept.sum().clamp_min(1)


def density_loss(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    eps: float = EPS,
    weight: float = 1.0,
    layers: Sequence[float] | str | None = None,
    only: Sequence[str] | None = None,
) -> DensityLoss:
    """Watch a model's MLPs and give the density penalty of each forward pass.

    eps: where the smooth count of h is one half is sqrt(eps). The paper's 1e-7 reaches activations below 0.01
        only; 1e-2 also moves larger ones, and GELU and SiLU need it.
    weight: of the penalty in the sum; a plain number, which a schedule may set on the result at any time.
    layers: what each MLP counts: numbers in the order of the MLPs, or "learned" for weights that are trained
        (softmax, mean 1): give `density.parameters()` to the optimizer then. None counts all alike.
    only: FQNs of the MLPs to watch, as `thresher.explain` names them; None for all.
    example_inputs: one batch, to find the MLPs with; a Hugging Face model brings its own.

    Works for full fine-tuning and with PEFT, whichever of the model's parameters are trained. Where dropout lies
    between activation and down projection (T5), the penalty sees its zeros.
    """
    if eps <= 0:
        raise ArgumentError("eps", eps, "above 0", "The default is 1e-2; the paper uses 1e-7.")
    sites = mlps(model, example_inputs)
    if only is not None:
        known = [s.fqn for s in sites]
        for name in only:
            if name not in known:
                raise ArgumentError(
                    "only", repr(name), f"MLPs of this model: {', '.join(known)}", "Use those names."
                )
        sites = [s for s in sites if s.fqn in only]
    if layers is None:
        layers = [1.0] * len(sites)
    elif layers != "learned" and not _are_weights(layers, len(sites)):
        raise ArgumentError(
            "layers", repr(layers), f"'learned', or {len(sites)} numbers of which none is negative and one is positive",
            "One number for each MLP, in order.",
        )  # fmt: skip
    return DensityLoss(model, sites, eps, weight, layers)


def _are_weights(layers: Any, count: int) -> bool:
    return not isinstance(layers, str) and len(layers) == count and min(layers) >= 0 and sum(layers) > 0
