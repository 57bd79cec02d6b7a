"""The hooks of modules, which Dynamo looks for when it traces a module and never again."""

from __future__ import annotations

import torch

OF_MODULES = frozenset(vars(torch.nn.Module()))
"""Attributes that every module has."""
HOOKS = tuple(
    name
    for name in OF_MODULES
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name
)
"""Attributes that hold the hooks of a module's calls; those of saving and loading run at no call."""


def hooks_of(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """The hooks of a model's modules, by their numbers, which no two hooks of a process share."""
    return [tuple(held) for m in model.modules() for held in map(vars(m).get, HOOKS) if held]
