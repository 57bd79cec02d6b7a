"""Imports every operator family, so that `torch.ops.thresher` is complete.

A saved program or a compiled artifact can only be loaded once the operators it holds are defined.
"""

from __future__ import annotations

import importlib

FAMILIES: tuple[str, ...] = (
    # one name a line, sorted
    "experts",
    "few_linear",
    "half_linear",
    "hadamard",
    "kv",
    "nvfp4",
    "sparse",
    "tokens",
    "varlen",
    "wna16",
)


def load() -> None:
    """Define all operators. Cheap: no kernel is built until one is first asked for."""
    for family in FAMILIES:
        importlib.import_module(f"thresher.kernels.{family}")
