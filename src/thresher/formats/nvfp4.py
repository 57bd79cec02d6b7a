"""The NVFP4 storage format: E2M1 codes, their packing, and the scale layouts of the hardware.

An NVFP4 value is `E2M1 code * E4M3 scale of its block of 16 * one fp32 scale of the tensor`: 4.5 bits.

E2M1 is sign, two exponent bits (bias 1), one mantissa bit: 0, .5, 1, 1.5, 2, 3, 4, 6 and their
negatives; it has neither infinity nor NaN. Rounding is to nearest, ties to the even code. The cast
saturates (so infinity becomes 6), writes -0.0 as +0, keeps the sign of negative values that round
to zero (code 8), and writes NaN as 0: NaN is carried by the block scale (0x7F) instead, because no
code can hold it. Two codes share a byte, the even element in the low nibble.
"""

from __future__ import annotations

import torch

from thresher.errors import ArgumentError

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
SCALE_NAN = 0x7F
E2M1_VALUES: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each code with the sign bit (8) removed."""


def encode_e2m1(x: torch.Tensor, *, keep_negative_zero: bool = False) -> torch.Tensor:
    """fp32, bf16 or fp16 values to E2M1 codes (uint8, 0..15), same shape.

    The representable magnitudes lie on three lines of slope 2, 1 and 1/2, and the right code is the
    smallest of the three roundings: the curve through the values is concave.
    keep_negative_zero: -0.0 becomes code 8 instead of 0.
    """
    if not x.is_floating_point():
        raise ArgumentError("x", x.dtype, "a floating-point tensor", "Convert it with .float().")
    value = x.float()
    magnitude = value.abs().nan_to_num_(nan=0.0).clamp_(max=E2M1_MAX)
    codes = torch.minimum((magnitude * 2).round_(), magnitude.round() + 2)
    codes = torch.minimum(codes, (magnitude * 0.5).round_() + 4).to(torch.uint8)
    negative = value.signbit() & ~value.isnan() if keep_negative_zero else value < 0
    return codes | (negative.to(torch.uint8) << 3)


def encode_e2m1_stochastic(x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """E2M1 codes whose expected value is `x` (clamped to +-6): rounded up with the fraction's probability."""
    value = x.float()
    magnitude = value.abs().nan_to_num_(nan=0.0).clamp_(max=E2M1_MAX)
    table = torch.tensor((*E2M1_VALUES, E2M1_VALUES[-1] + 1), device=x.device)
    below = torch.bucketize(magnitude, table[1:8], right=True)
    low, high = table[below], table[below + 1]
    uniform = torch.rand(magnitude.shape, generator=generator, device=x.device)
    codes = below + (uniform * (high - low) < magnitude - low)
    return codes.to(torch.uint8) | ((value < 0).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Codes (uint8, 0..15) to fp32 values, same shape; code 8 is -0.0."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], device=codes.device)
    return table[codes.long()]


def dequantized(codes: torch.Tensor, block_scales: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """fp32 [N, 16B]: what packed codes (uint8 [N, 8B]), E4M3 scales (uint8 or float8 [N, B]) and a scale (fp32 []) mean."""
    scales = block_scales.view(torch.float8_e4m3fn).float() * tensor_scale
    return decode_e2m1(unpack(codes)) * scales.repeat_interleave(BLOCK, -1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[..., K] codes to [..., K/2] bytes, even k in the low nibble. K must be even."""
    if codes.shape[-1] % 2:
        raise ArgumentError(
            "codes", f"a last dimension of {codes.shape[-1]}", "an even one", "Pad K with pad_blocks first."
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """[..., K/2] bytes to [..., K] codes (uint8, 0..15)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def padded(k: int) -> int:
    """The number of columns stored for `k` input features: the next multiple of 16."""
    return -(-k // BLOCK) * BLOCK


def pad_blocks(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last dimension zero-padded to a multiple of 16; itself when it is one already."""
    short = padded(x.shape[-1]) - x.shape[-1]
    return torch.nn.functional.pad(x, (0, short)) if short else x


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """[R, C] block scales to the 128x4 layout (SWIZZLE_32_4_4) of Blackwell's tensor cores, flat.

    Rows are padded to 128 and columns to 4 with zero bytes: stale padding would be multiplied in.
    Element (r, c) lands at ((r/128)*ceil(C/4) + c/4)*512 + (r%32)*16 + ((r%128)/32)*4 + c%4.
    """
    rows, columns = scales.shape
    tall, wide = -(-rows // 128), -(-columns // 4)
    short = (0, wide * 4 - columns, 0, tall * 128 - rows)
    full = torch.nn.functional.pad(scales.view(torch.uint8), short)
    tiles = full.view(tall, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)


def unswizzle(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of `swizzle`: the [rows, columns] scales, padding dropped."""
    tall, wide = -(-rows // 128), -(-columns // 4)
    if flat.numel() != tall * wide * 512:
        raise ArgumentError(
            "flat",
            f"{flat.numel()} scales",
            f"{tall * wide * 512} for {rows} x {columns} scales (rows padded to 128, columns to 4)",
            "Pass the shape of the unswizzled scales: [out_features, in_features / 16].",
        )
    tiles = flat.reshape(-1).view(torch.uint8).view(tall, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall * 128, wide * 4)[:rows, :columns].contiguous().view(flat.dtype)
