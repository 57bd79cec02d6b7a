"""`thresher.relufy`: GELU and SiLU, which are never exactly zero, become ReLU, for fine-tuning to make sparse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import ThresherError
from .mlp_sites import Mlp, mlps

_NAMES_AN_ACTIVATION = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "dense_act_fn",
    "activation",
)


def relufy(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Swap the activation of every MLP for ReLU, in place; the model's config says so too. Returns the model.

    The model must be fine-tuned afterwards. Raises ThresherError for an activation that is no module of its own.
    """
    sites = [s for s in mlps(model, example_inputs) if not s.activation.startswith("relu")]
    if not sites:
        return model
    hidden = [s for s in sites if not isinstance(_swappable(model, s), nn.Module)]
    if hidden:
        raise ThresherError(
            f"{hidden[0].fqn} computes its {hidden[0].activation} in its own forward, where it cannot be swapped. "
            "Build the model with a ReLU in its config instead."
        )
    for site in sites:
        owner, _, name = site.activation_module.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.ReLU())
    for config in _configs(getattr(model, "config", None)):
        for name in _NAMES_AN_ACTIVATION:
            if isinstance(getattr(config, name, None), str):
                setattr(config, name, "relu")
        if isinstance(getattr(config, "feed_forward_proj", None), str):
            config.feed_forward_proj = "gated-relu" if "gated" in config.feed_forward_proj else "relu"
    return model


def _swappable(model: nn.Module, site: Mlp) -> nn.Module | None:
    """The activation's module, when it is one that holds nothing else."""
    try:
        module = model.get_submodule(site.activation_module)
    except AttributeError:
        return None
    return module if site.activation_module and not any(True for _ in module.parameters()) else None


def _configs(config: Any) -> Iterator[Any]:
    if config is not None:
        yield config
        for name in getattr(config, "sub_configs", {}):
            yield from _configs(getattr(config, name, None))
