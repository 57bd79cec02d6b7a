"""Low-bit weights for sparse MLPs: each neuron's row is rounded by itself, in groups along the outputs.

GPTQ and NVFP4 group a weight along its inputs, which in a down projection are the neurons: a lone active
neuron would then read its whole group's scales, and NVFP4's 16 to a scale would double its bytes. Along the
outputs a row carries its own scales, and what is off stays unread. Rounding is to nearest.
"""

from __future__ import annotations

import torch

GROUP = 64  # outputs to a scale, for 4 bits; 8 bits have one scale a row


def group_size(features: int, bits: int) -> int:
    """Outputs to a scale: all at 8 bits; at 4 bits 64, or all where 64 does not divide them."""
    return GROUP if bits == 4 and features % GROUP == 0 else features


def scales(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32 [F], or [F, groups], of a neuron-major weight [F, D]: the largest magnitude over the largest code."""
    grouped = weight.float().unflatten(1, (-1, group_size(weight.shape[1], bits)))
    found = grouped.abs().amax(-1) / ((1 << (bits - 1)) - 1)
    found = torch.where(found == 0, torch.ones_like(found), found)
    return found[:, 0].contiguous() if found.shape[1] == 1 else found.contiguous()


def codes(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [F, D], or uint8 [F, D / 2] of 4-bit codes plus 8, two a byte, the first in the low half."""
    step = scales(weight, bits).view(weight.shape[0], -1, 1)
    most = (1 << (bits - 1)) - 1
    wide = (weight.float().unflatten(1, (step.shape[1], -1)) / step).round().clamp(-most, most).flatten(1)
    if bits == 8:
        return wide.to(torch.int8).contiguous()
    shifted = (wide + 8).to(torch.uint8)
    return (shifted[:, 0::2] | (shifted[:, 1::2] << 4)).contiguous()
