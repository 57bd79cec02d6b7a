"""The E2M1 cast against an integer oracle, packing, padding and the scale layout of the hardware."""

import os

import pytest
import torch

from thresher.errors import ArgumentError
from thresher.formats import nvfp4 as f

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def oracle(bits):
    """fp32 bit patterns (int64) to codes, by comparing integers: magnitudes order like their bits."""
    magnitude = bits & 0x7FFFFFFF
    code = (magnitude > 0x3E800000).to(torch.uint8)  # above 0.25
    code += magnitude >= 0x3F400000  # 0.75 is a tie and goes up, to the even code
    code += magnitude > 0x3FA00000
    code += magnitude >= 0x3FE00000
    code += magnitude > 0x40200000
    code += magnitude >= 0x40600000
    code += magnitude > 0x40A00000
    nan = magnitude > 0x7F800000
    negative = (bits >= 0x80000000) & (magnitude > 0) & ~nan
    return code.masked_fill(nan, 0) | (negative.to(torch.uint8) << 3)


def from_bits(bits):
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def test_cast_of_every_bf16_value():
    bits = torch.arange(1 << 16) << 16
    codes = oracle(bits)
    assert torch.equal(f.encode_e2m1(from_bits(bits)), codes)
    assert torch.equal(f.encode_e2m1(from_bits(bits).bfloat16()), codes)


def test_cast_of_ties_and_their_neighbours():
    middle = torch.tensor(TIES).view(torch.int32).long()
    bits = torch.cat([middle + d for d in range(-3, 4)])
    bits = torch.cat([bits, bits + (1 << 31)])
    assert torch.equal(f.encode_e2m1(from_bits(bits)), oracle(bits))
    assert f.encode_e2m1(torch.tensor(TIES)).tolist() == [0, 2, 2, 4, 4, 6, 6]


def test_cast_of_random_bit_patterns():
    bits = torch.randint(1 << 32, (8 << 20,), generator=torch.Generator().manual_seed(0))
    for part in bits.split(1 << 21):
        assert torch.equal(f.encode_e2m1(from_bits(part)), oracle(part))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("THRESHER_EXHAUSTIVE"), reason="Takes minutes: set THRESHER_EXHAUSTIVE=1."
)
def test_cast_of_every_fp32_value():
    for start in range(0, 1 << 32, 1 << 22):
        bits = torch.arange(start, start + (1 << 22))
        assert torch.equal(f.encode_e2m1(from_bits(bits)), oracle(bits)), hex(start)


def test_special_values():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -1e-40, -0.25, 1e-40])
    assert f.encode_e2m1(x).tolist() == [0, 0, 7, 15, 0, 8, 8, 0]
    assert f.encode_e2m1(x, keep_negative_zero=True).tolist() == [0, 8, 7, 15, 0, 8, 8, 0]
    with pytest.raises(ArgumentError, match="floating-point"):
        f.encode_e2m1(torch.arange(3))


def test_decode_inverts_encode():
    codes = torch.arange(16, dtype=torch.uint8)
    values = f.decode_e2m1(codes)
    assert torch.equal(f.encode_e2m1(values, keep_negative_zero=True), codes)
    assert values[1:8].tolist() == [0.5, 1, 1.5, 2, 3, 4, 6] and values[8].signbit()


def test_stochastic_rounding_is_unbiased_and_takes_only_the_two_neighbours():
    x = torch.tensor([0.1, 0.5, 1.2, -1.9, 2.3, 3.7, -5.5, 6.0, 9.0])
    trials = 20_000
    codes = f.encode_e2m1_stochastic(x.repeat(trials, 1), torch.Generator().manual_seed(0))
    values = f.decode_e2m1(codes)
    clamped = x.clamp(-6, 6)
    table = torch.tensor(f.E2M1_VALUES)
    low = torch.stack([table[table <= v.abs()].max() for v in clamped])
    high = torch.stack([table[table >= v.abs()].min() for v in clamped])
    assert ((values.abs() == low) | (values.abs() == high)).all()
    sigma = ((high - clamped.abs()) * (clamped.abs() - low)).clamp_min(0).sqrt() / trials**0.5
    assert ((values.mean(0) - clamped).abs() <= 4 * sigma + 1e-6).all()


def test_even_elements_sit_in_the_low_nibble():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert f.pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(f.unpack(f.pack(codes)), codes)
    with pytest.raises(ArgumentError, match="even"):
        f.pack(codes[:, :3])


@pytest.mark.parametrize("k, expected", [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_padding(k, expected):
    x = torch.ones(2, k)
    assert f.padded(k) == expected and f.pad_blocks(x).shape == (2, expected)
    assert f.pad_blocks(x).sum() == 2 * k


@pytest.mark.parametrize("rows, columns", [(1, 1), (128, 4), (129, 5), (300, 37)])
def test_swizzle(rows, columns):
    scales = torch.randint(1, 0x7F, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    flat = f.swizzle(scales)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    at = (r // 128 * -(-columns // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    expected = torch.zeros(flat.numel(), dtype=torch.uint8)  # padding must be zero
    expected[at.flatten()] = scales.view(torch.uint8).flatten()
    assert torch.equal(flat.view(torch.uint8), expected)
    back = f.unswizzle(flat, rows, columns)
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_unswizzle_refuses_the_wrong_size():
    with pytest.raises(ArgumentError, match="512"):
        f.unswizzle(torch.zeros(100, dtype=torch.uint8), 8, 4)


def test_swizzle_equals_torchao():
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = torch.randint(0, 0x7F, (300, 37), dtype=torch.uint8)
    assert torch.equal(f.swizzle(scales), utils.to_blocked(scales))
