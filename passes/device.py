"""The device that a recipe's sites are priced for."""

from __future__ import annotations

import torch

from thresher.graph.program import Program
from thresher.machine import devices
from thresher.machine.devices import Device
from thresher.machine.linear_rates import with_linears
from thresher.pricing import dtype_of
from thresher.recipe import Recipe

from .base import PASSES


def device_for(place: torch.device, recipe: Recipe, program: Program) -> Device:
    """What is known of a device; for a recipe that leaves what would lose, with times of the linears it may make there."""
    device = devices.of(place)
    if not recipe.min_gain:
        return device
    kernels = [k for config in recipe.passes for k in PASSES[config.name].linear_kernels(config)]
    linears = program.nodes(torch.ops.aten.linear.default)
    return with_linears(device, kernels, sorted({dtype_of(n.args[0]) for n in linears}))
