"""How activations enter an NVFP4 product, in plain ATen: what exported forms of `nvfp4_linear` are built of."""

from __future__ import annotations

import torch

from thresher.formats import nvfp4 as nvfp4_format

from .linear import INT_LIMITS
from .quantize import MODES


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 values to the nearest E2M1 value (ties to the even code, saturating at 6), as fp32."""
    size = x.abs().clamp(max=nvfp4_format.E2M1_MAX)
    code = torch.minimum((size * 2).round(), size.round() + 2)
    code = torch.minimum(code, (size * 0.5).round() + 4)
    value = torch.where(code <= 4, code * 0.5, torch.where(code <= 6, code - 2, 6.0))
    return torch.where(x < 0, -value, value)


def round_activations(x, activations: str, input_scale=None):
    """`nvfp4.linear.round_activations` without bytes: fp32 values [..., 16B] and a factor for the result."""
    one = torch.ones((), device=x.device)
    rows = nvfp4_format.pad_blocks(x).float()
    if activations == "exact":
        return rows, one
    blocks = rows.unflatten(-1, (-1, nvfp4_format.BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    if activations == "nvfp4":
        mode = MODES["thresher"]
        amax = (
            rows.abs().reshape(-1).amax(0)
            if input_scale is None
            else input_scale.reshape(()).float() * 2688.0
        )
        g = mode.tensor_scale(amax, nvfp4_format.E4M3_MAX)
        scale = mode.block_scale(largest, g, x.dtype)
        return (round_e2m1(blocks * mode.multiplier(scale, g)) * scale).flatten(-2), mode.decode(g)
    limit = INT_LIMITS[activations]
    inverse = torch.full_like(largest, limit) / largest
    inverse = torch.where(largest > 0, inverse.clamp(max=torch.finfo(torch.float32).max), 0.0)
    return ((blocks * inverse).round() * (largest / limit)).flatten(-2), one
