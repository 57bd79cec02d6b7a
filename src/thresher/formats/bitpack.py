"""Low-bit codes packed into 32-bit words: the one storage layout every low-bit weight here uses.

A row of K codes of b bits is a little-endian bit stream: code k takes bits [k*b, (k+1)*b) of the
stream, bit i of the stream is bit i % 32 of word i // 32, and codes may straddle two words (3, 5, 6
and 7 bits). 32 codes fill exactly b words. Unused bits of the last word are zero.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError

_RUN = 32  # codes that fill a whole number of words, whatever their width


def check_bits(bits: int) -> None:
    """Raise ArgumentError unless `bits` is a width that can be packed."""
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ArgumentError("bits", repr(bits), "an integer from 1 to 8", "Choose a width in that range.")


def words(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., words(K, bits)] from integer codes [..., K], each in [0, 2**bits)."""
    check_bits(bits)
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ArgumentError("codes", str(codes.dtype), "an integer dtype", "Round and convert them first.")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        low, high = int(codes.min()), int(codes.max())
        raise ArgumentError(
            "codes",
            f"values in [{low}, {high}]",
            f"values in [0, {(1 << bits) - 1}]",
            "Add the zero point first.",
        )
    count = codes.shape[-1]
    runs = -(-count // _RUN)
    full = torch.nn.functional.pad(codes.to(torch.int32), (0, runs * _RUN - count))
    full = full.reshape(*codes.shape[:-1], runs, _RUN)
    out = full.new_zeros(*codes.shape[:-1], runs, bits)
    for j in range(_RUN):
        word, shift = divmod(j * bits, 32)
        out[..., word] |= full[..., j] << shift
        if shift + bits > 32:
            out[..., word + 1] |= full[..., j] >> (32 - shift)
    return out.flatten(-2)[..., : words(count, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [..., count] from int32 words [..., words(count, bits)]: the inverse of `pack`."""
    check_bits(bits)
    if packed.dtype != torch.int32 or packed.shape[-1] != words(count, bits):
        raise ArgumentError(
            "packed",
            f"{packed.dtype} {tuple(packed.shape)}",
            f"int32 with last dimension {words(count, bits)} for {count} codes of {bits} bits",
            "Pass the words that pack() gave, and the same count and bits.",
        )
    runs = -(-count // _RUN)
    full = torch.nn.functional.pad(packed, (0, runs * bits - packed.shape[-1]))
    full = full.reshape(*packed.shape[:-1], runs, bits)
    out = torch.empty(*packed.shape[:-1], runs, _RUN, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for j in range(_RUN):
        word, shift = divmod(j * bits, 32)
        kept = min(bits, 32 - shift)
        code = (full[..., word] >> shift) & ((1 << kept) - 1)  # the mask undoes the sign extension
        if kept < bits:
            code = code | (full[..., word + 1] << kept) & mask
        out[..., j] = code.to(torch.uint8)
    return out.flatten(-2)[..., :count].contiguous()
