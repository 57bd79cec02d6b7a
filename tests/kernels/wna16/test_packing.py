"""Bit packing: every code survives, the layout is the one that is documented, bad input is named."""

import pytest
import torch

from thresher.errors import ArgumentError
from thresher.formats import bitpack

WIDTHS = range(1, 9)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_in_every_lane(bits):
    codes = (torch.arange(1 << bits)[:, None] + torch.arange(37)) % (1 << bits)
    packed = bitpack.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (1 << bits, bitpack.words(37, bits))
    assert torch.equal(bitpack.unpack(packed, bits, 37), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 7, 31, 32, 33, 64, 65])
def test_tails(bits, count):
    codes = torch.randint(0, 1 << bits, (2, 3, count), generator=torch.Generator().manual_seed(count))
    packed = bitpack.pack(codes, bits)
    assert packed.shape == (2, 3, -(-count * bits // 32))
    assert torch.equal(bitpack.unpack(packed, bits, count), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_layout_is_a_little_endian_bit_stream(bits):
    codes = torch.randint(0, 1 << bits, (50,), generator=torch.Generator().manual_seed(bits))
    stream = sum(int(code) << (k * bits) for k, code in enumerate(codes))
    expected = [stream >> (32 * i) & 0xFFFFFFFF for i in range(bitpack.words(50, bits))]
    assert [int(word) & 0xFFFFFFFF for word in bitpack.pack(codes, bits)] == expected


def test_four_bit_bytes_hold_the_even_column_in_the_low_nibble():
    packed = bitpack.pack(torch.arange(8), 4).view(torch.uint8)
    assert packed.tolist() == [0x10, 0x32, 0x54, 0x76]


@pytest.mark.parametrize(
    "codes, bits, argument",
    [
        (torch.tensor([4]), 2, "codes"),
        (torch.tensor([-1]), 4, "codes"),
        (torch.tensor([1.0]), 4, "codes"),
        (torch.tensor([True]), 4, "codes"),
        (torch.tensor([1]), 9, "bits"),
        (torch.tensor([1]), 0, "bits"),
    ],
)
def test_pack_refuses(codes, bits, argument):
    with pytest.raises(ArgumentError) as caught:
        bitpack.pack(codes, bits)
    assert caught.value.argument == argument


def test_unpack_refuses_words_that_do_not_fit_the_count():
    with pytest.raises(ArgumentError, match="packed"):
        bitpack.unpack(torch.zeros(3, 2, dtype=torch.int32), 4, 17)
    with pytest.raises(ArgumentError, match="packed"):
        bitpack.unpack(torch.zeros(3, 2, dtype=torch.int64), 4, 16)
