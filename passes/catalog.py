"""Imports every pass, so that recipes know their names; third-party passes come by entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

PASS_MODULES: tuple[str, ...] = (
    # one name a line, sorted
    "bf16",
    "causal_mask",
    "decode_attention",
    "deft",
    "nvfp4",
    "prepack",
    "rsq",
    "transprune",
    "zipvl",
)
ENTRY_POINTS = "thresher.passes"


def load() -> None:
    """Register all passes of this package and those that installed packages offer."""
    for module in PASS_MODULES:
        importlib.import_module(f"thresher.passes.{module}")
    for point in entry_points(group=ENTRY_POINTS):
        point.load()
