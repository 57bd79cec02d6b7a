"""Imports every pass, so that recipes know their names; third-party passes come by entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

PASS_MODULES: tuple[str, ...] = (
    # one name a line, in the order in which they run, whatever the order in a recipe (see order.py)
    "prepack",  # which tokens there are: padding goes first, for everything behind is then traced for fewer
    "causal_mask",
    "transprune",
    "zipvl",
    "deft",  # which neurons, in the full-precision weights
    "rsq",  # how the weights are stored
    "nvfp4",
    "decode_attention",  # behind those that look for a decoder's layers, whose attention it makes unlike PyTorch's
    "bf16",  # takes what the others left
)
ENTRY_POINTS = "thresher.passes"


def load() -> None:
    """Register all passes of this package and those that installed packages offer."""
    for module in PASS_MODULES:
        importlib.import_module(f"thresher.passes.{module}")
    for point in entry_points(group=ENTRY_POINTS):
        point.load()
