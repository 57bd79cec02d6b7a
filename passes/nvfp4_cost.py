"""What an NVFP4 linear is expected to gain over the linear it replaces, at the sizes of the capture.

A roofline: a linear takes the longer of reading its weights and multiplying, plus what the call costs.
The rates are those of one core of the machine in benchmarks/results/nvfp4.json, and of an H100's data
sheet; they decide nothing but which sites to leave alone, and a prediction within a third is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thresher.program import value

from .structure import LinearSite
from .token_axes import hint

BITS = 4.5


@dataclass(frozen=True)
class Rates:
    """bytes_s: weight bytes read a second. plain, packed: multiply-adds a second of the linear as it is and of the
    NVFP4 kernel. decode: weights decoded a second, where many rows are multiplied by a decoded copy.
    call_s: what one call of the operator costs beyond that of `linear`. few: rows that the kernel for few
    rows takes."""

    bytes_s: float
    plain: float
    packed: float
    decode: float
    call_s: float
    few: int


CPU = Rates(bytes_s=12e9, plain=45e9, packed=16e9, decode=4e9, call_s=20e-6, few=16)
CUDA = Rates(bytes_s=3.0e12, plain=4e14, packed=3.6e14, decode=float("inf"), call_s=15e-6, few=4)
INTEGER_SPEED = {"exact": 1.0, "int16": 1.6, "int8": 2.6, "nvfp4": 0.9}


def predicted_gain(site: LinearSite, activations: str, device: torch.device) -> float:
    """Time before over time after."""
    rates = CUDA if device.type == "cuda" else CPU
    rows = 1
    for size in value(site.x).shape[:-1]:
        rows *= hint(size)
    weights = site.in_features * site.out_features
    width = value(site.x).element_size()
    products = rows * weights
    before = max(width * weights / rates.bytes_s, products / rates.plain)
    speed = rates.packed * (INTEGER_SPEED[activations] if device.type == "cpu" else 1)
    few = max(BITS / 8 * weights / rates.bytes_s, products / speed)
    many = weights / rates.decode + products / rates.plain
    if activations in ("int16", "int8") or rows <= rates.few:
        after = few
    else:
        after = many
    return before / (after + rates.call_s)
