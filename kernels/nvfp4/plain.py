"""A linear over NVFP4 weights in plain ATen: bytes are taken apart by division, E2M1 and E4M3 by arithmetic."""

from __future__ import annotations

import torch

from thresher.formats import nvfp4 as nvfp4_format
from thresher.plain_form import Plain

from .quantize import MODES

INT_LIMITS = {"int8": 127.0, "int16": 32639.0}  # 32639 = 127 * 256 + 127: splits into two signed bytes
LOSS = "It unpacks its weights at every call: they stay small where they are stored, and the product is no faster."


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


def decode_e4m3(scales: torch.Tensor) -> torch.Tensor:
    """fp32 from float8_e4m3fn, or from its bytes (uint8): sign, four exponent bits, three of the mantissa, no infinity."""
    if scales.dtype != torch.uint8:
        return scales.float()
    code = scales.int()
    size = code % 128
    exponent, mantissa = size // 8, (size % 8).float()
    # at least 1: the smallest exponent's numbers have no leading one, and its step
    power = torch.pow(2.0, (exponent.clamp(min=1) - 10).float())
    value = torch.where(exponent > 0, mantissa + 8, mantissa) * power
    value = torch.where(size == 127, torch.nan, value)
    return torch.where(code < 128, value, -value)


def _nvfp4_linear(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
    rows, factor = round_activations(x, activations, input_scale)
    wide = codes.int()
    nibbles = torch.stack((wide % 16, wide // 16), -1).flatten(-2)
    size = (nibbles % 8).float()
    # 0, .5, 1, 1.5, 2, 3, 4, 6: the exponent's lines meet in the largest of the three, as in `round_e2m1`
    value = torch.where(size <= 4, size * 0.5, torch.where(size <= 6, size - 2, 6.0))
    value = torch.where(nibbles < 8, value, -value).unflatten(-1, (-1, nvfp4_format.BLOCK))
    weight = (value * decode_e4m3(block_scales)[..., None]).flatten(-2)
    y = rows @ weight.t() * (global_scale.reshape(()) * factor)
    return (y if bias is None else y + bias.float()).to(x.dtype)


PLAIN = Plain(run=_nvfp4_linear, loss=LOSS)
