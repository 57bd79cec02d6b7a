"""A linear over integer codes in plain ATen: words are taken apart by division, so that no operator on bits is needed."""

from __future__ import annotations

import torch

from thresher.plain_form import Plain

LOSS = "It unpacks its weights at every call: they stay small where they are stored, and the product is no faster."


def codes_of(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int64 [N, count] from int32 words [N, words(count, bits)]: `bitpack.unpack` in arithmetic."""
    unsigned = words.long() % (1 << 32)
    first = torch.arange(count, device=words.device) * bits
    word, shift = first // 32, first % 32
    low = unsigned.index_select(1, word) // (1 << shift)
    over = shift + bits > 32  # the code goes on in the next word
    high = unsigned.index_select(1, torch.where(over, word + 1, word)) * torch.where(
        over, 1 << (32 - shift), 0
    )
    return (low + high) % (1 << bits)


def _wna16_linear(x, codes, scales, zeros, bias, bits, group_size):
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs, groups, inputs = codes.shape[0], scales.shape[1], x.shape[-1]
    values = codes_of(codes, bits, inputs).to(wide).reshape(outputs, groups, inputs // groups)
    zero = float(1 << (bits - 1)) if zeros is None else zeros.to(wide)[..., None]
    weight = ((values - zero) * scales.to(wide)[..., None]).reshape(outputs, inputs)
    out = x.to(wide) @ weight.t()
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


PLAIN = Plain(run=_wna16_linear, loss=LOSS)
