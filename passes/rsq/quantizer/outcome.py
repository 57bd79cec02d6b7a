"""What a quantization found: codes and importance, and of each linear how far it is from the original."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..config import RSQConfig
from ..edits import RotationPlan
from . import codes as rsq_codes
from .gptq import output_error, round_to_nearest
from .rounding import Rounded


@dataclass(frozen=True)
class LinearReport:
    """One linear. nearest, quantized: relative squared error of its output on the calibration tokens, weighted as
    in the Hessian, when its weights are rounded to nearest and as they are; from up to 64 of its rows."""

    site: str
    bits: float
    nearest: float
    quantized: float
    damping: float
    bytes_before: int
    bytes_after: int


@dataclass
class Outcome:
    """What the driver found. linears: tensors by site, see `rsq_codes.to_tensors`. reports: by site.
    importance: raw scores by layer, fp32 [tokens], for the histogram. exact: the rotation's fp64 error.
    bits: chosen width by layer, where mixed. fingerprint: of the source model's weights."""

    fingerprint: str
    config: RSQConfig
    plan: RotationPlan
    exact: float
    linears: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    reports: dict[str, LinearReport] = field(default_factory=dict)
    importance: dict[str, torch.Tensor] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)


def report(
    name: str,
    found: Rounded,
    hessian: torch.Tensor,
    damping: float,
    tensors: rsq_codes.Tensors,
    config: RSQConfig,
    element_size: int,
) -> LinearReport:
    """What became of one linear.

    hessian: [in, in], of its inputs, at any scale; damping: added to it. tensors: its codes, see
    `rsq_codes.to_tensors`. element_size: bytes of a weight in the model.
    """
    grid = rsq_codes.make_grid(config, int(tensors.get("bits", torch.tensor(4))))
    nearest = round_to_nearest(found.before, grid).values
    size = rsq_codes.stored_bytes(tensors)
    return LinearReport(
        name,
        8 * size / found.codes.numel(),
        output_error(found.before, nearest, hessian),
        output_error(found.before, found.after, hessian),
        damping,
        found.codes.numel() * element_size,
        size,
    )
