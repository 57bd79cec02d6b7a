"""What operators' checks share. Each raises ArgumentError; kernels then read memory without asking.

Metadata is compared on every device. Values are read on a CPU only, where it costs a microsecond; on a GPU it
would wait for the device, and there an index beyond its tensor is the kernel's own to mask.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from thresher.errors import ArgumentError

_FEW = 64  # numbers; up to so many are quicker looked at one by one
INTEGERS = (torch.int32, torch.int64)


def given(t: torch.Tensor) -> str:
    """A tensor as an error shows it: its dtype and shape."""
    return f"{t.dtype} {tuple(t.shape)}"


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise unless x [..., in], weight [out, in] and bias [out] or None fit together. Reads metadata only."""
    if x.dim() < 1 or not x.is_floating_point():
        raise ArgumentError("x", given(x), "floating [..., in_features]", "Convert it first.")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        accepted = f"{x.dtype} [out_features, {x.shape[-1]}]"
        raise ArgumentError("weight", given(weight), accepted, "Pass the weight of x's own layer.")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0] or bias.dtype != x.dtype):
        accepted = f"{x.dtype} [{weight.shape[0]}], or None"
        raise ArgumentError("bias", given(bias), accepted, "Give one value an output feature.")


def in_range(name: str, index: torch.Tensor, low: int, high: int, fix: str) -> None:
    """Raise unless every index lies in low .. high (both included). Reads CPU tensors only."""
    if index.device.type != "cpu" or not index.numel():
        return
    least, most = (int(t) for t in torch.aminmax(index))
    if least < low or most > high:
        raise ArgumentError(name, f"indices from {least} to {most}", f"indices from {low} to {high}", fix)


def rising(name: str, offsets: torch.Tensor, last: int, fix: str, first: int | None = 0) -> None:
    """Raise unless int32 [n] offsets never fall, from `first` to `last`. Reads CPU tensors only.

    first: None where the list starts with the end of its first part; without parts it is then empty.
    """
    if offsets.dim() != 1 or offsets.dtype != torch.int32:
        raise ArgumentError(name, given(offsets), "int32, one dimension", fix)
    if offsets.device.type != "cpu":
        return
    count = offsets.shape[0]
    if count <= _FEW:
        ends = offsets.tolist()
        falls = any(a > b for a, b in pairwise(ends))
    else:
        ends = [int(offsets[0]), int(offsets[-1])]
        falls = bool((offsets.diff() < 0).any())
    if ends:
        fits = (ends[0] >= 0 if first is None else ends[0] == first) and ends[-1] == last and not falls
    else:
        fits = first is None and last == 0
    if not fits:
        shown = ends if count <= 9 else f"{count} offsets from {ends[0]} to {ends[-1]}"
        start = "" if first is None else f"from {first} "
        raise ArgumentError(name, shown, f"offsets that never fall, {start}to {last}", fix)


def queries(q: torch.Tensor, scale: float, batch: int | None = None) -> None:
    """Raise unless q is floating [B, heads, tokens, head_dim] and the scale a number."""
    if not math.isfinite(scale):
        raise ArgumentError("scale", scale, "a finite number", "1 / sqrt(head_dim) is usual.")
    if q.dim() != 4 or not q.shape[1] or not q.is_floating_point() or q.shape[0] != (batch or q.shape[0]):
        accepted = f"floating [{batch or 'batch'}, heads, tokens, head_dim]"
        raise ArgumentError("q", given(q), accepted, "Give a layer's queries.")


def keys(q: torch.Tensor, tokens: int | None = None, **named: torch.Tensor) -> None:
    """Raise unless each named tensor is [B, kv_heads, tokens, head_dim] in the dtype of q [B, Hq, n, D].

    tokens: how many each must hold. Keys stand first and have the queries' head_dim; values may have another.
    """
    batch, heads, _, dim = q.shape
    for name, t in named.items():
        fits = t.dim() == 4 and t.shape[0] == batch and t.shape[1] and not heads % t.shape[1]
        held = tokens if tokens is not None else "tokens"
        if not fits or t.dtype != q.dtype or (tokens is not None and t.shape[2] != tokens):
            accepted = f"{q.dtype} [{batch}, kv_heads, {held}, head_dim] with kv_heads a divisor of {heads}"
            fix = "Pass the keys and values of one layer, in the queries' dtype."
            raise ArgumentError(name, given(t), accepted, fix)
    (name, k), *values = named.items()
    like = values[0][1] if values else k
    if k.shape[3] != dim or k.shape[1:3] != like.shape[1:3]:
        accepted = f"[{batch}, {like.shape[1]}, {like.shape[2]}, {dim}]"
        fix = "Queries and keys are of one head_dim; keys and values of as many heads and tokens."
        raise ArgumentError(name, f"shape {tuple(k.shape)}", accepted, fix)


def refuse_scale(scale: float) -> str | None:
    """Why PyTorch's attention cannot take this scale, or None: it hides keys by adding -inf before it scales."""
    return None if scale > 0 else f"PyTorch's attention loses its mask at a scale of {scale}."
