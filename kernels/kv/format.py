"""Keys and values at 4 or 2 bits: the layout of a pool, `thresher::kv_quantize`, and back.

A pool holds slots (tokens in any order) of one layer, for all rows and heads alike:

    k_codes   uint8   [B, H, N, D * bits / 8]
    k_affine  float16 [B, H, blocks, 2, D]       step and low of each channel, per block of slots
    v_codes   uint8   [B, H, N, Dv * bits / 8]
    v_affine  float16 [B, H, N, 2]               step and low of each slot
    ends      int32   [blocks]                   the slot behind each block

value = low + step * code. Keys are scaled per channel, because a few channels are large in every
token; values per token (ZipVL section 3, after KIVI). A code row is cut into 8 / bits equal parts
that share bytes: byte i holds channel i of every part, the first in the lowest bits, so unpacking
is a shift and a mask, with no shuffle. Blocks may differ in length: each call appends its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from thresher.errors import ArgumentError
from thresher.ops import Sample, define

from .. import arguments
from . import plain

BITS = (2, 4, 8)
_HALF_MAX = 65504.0


class Pool(NamedTuple):
    """One pool's tensors, as the module's docstring lays them out."""

    k_codes: torch.Tensor
    k_affine: torch.Tensor
    v_codes: torch.Tensor
    v_affine: torch.Tensor
    ends: torch.Tensor

    @property
    def slots(self) -> int:
        return self.k_codes.shape[2]

    @property
    def bits(self) -> int:
        return 8 * self.k_codes.shape[3] // self.k_affine.shape[4]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def as_pools(tensors: Sequence[torch.Tensor]) -> list[Pool]:
    """The pools in a flat list of tensors, five each."""
    if len(tensors) % len(Pool._fields):
        raise ArgumentError(
            "pools", f"{len(tensors)} tensors", "five for each pool", f"In order: {', '.join(Pool._fields)}."
        )
    return [Pool(*tensors[i : i + 5]) for i in range(0, len(tensors), 5)]


def check_pool(pool: Pool, batch: int, heads: int, dim: int, dim_v: int) -> None:
    """Raise ArgumentError unless a pool's tensors are laid out as the module says; ends are read on a CPU."""
    k_codes, k_affine, v_codes, v_affine, ends = pool
    fix = "Pass pools of the same layer, as thresher::kv_quantize makes them."

    def refuse(name: str, accepted: str) -> ArgumentError:
        return ArgumentError("pools", f"{name} {arguments.given(getattr(pool, name))}", accepted, fix)

    lead = (batch, heads)
    accepted = f"uint8 [{batch}, {heads}, slots, {dim} * bits / 8] for 2, 4 or 8 bits"
    if k_codes.dim() != 4 or k_codes.shape[:2] != lead or k_codes.dtype != torch.uint8:
        raise refuse("k_codes", accepted)
    slots, blocks, bits = (
        k_codes.shape[2],
        ends.shape[0] if ends.dim() else 0,
        8 * k_codes.shape[3] // max(dim, 1),
    )
    if bits not in BITS or dim * bits != 8 * k_codes.shape[3]:
        raise refuse("k_codes", accepted)
    half = torch.float16
    if k_affine.dtype != half or k_affine.shape != (*lead, blocks, 2, dim):
        raise refuse("k_affine", f"float16 {(*lead, blocks, 2, dim)}")
    if v_codes.dtype != torch.uint8 or v_codes.shape[:3] != k_codes.shape[:3] or v_codes.dim() != 4 \
            or 8 * v_codes.shape[3] != dim_v * bits:  # fmt: skip
        raise refuse("v_codes", f"uint8 [{batch}, {heads}, {slots}, {dim_v} * {bits} / 8]")
    if v_affine.dtype != half or v_affine.shape != (*lead, slots, 2):
        raise refuse("v_affine", f"float16 {(*lead, slots, 2)}")
    arguments.rising("pools", ends, slots, fix, first=None)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., D], each below 2^bits, as [..., D * bits / 8]."""
    parts = codes.unflatten(-1, (8 // bits, -1))
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    return (parts << shifts[:, None]).sum(-2, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The uint8 codes [..., D] in [..., D * bits / 8]."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return (packed[..., None, :] >> shifts[:, None] & (1 << bits) - 1).flatten(-2)


def _affine(t: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and low along `dim` (kept, size 1), fp16: the grid that codes are then rounded to."""
    low, high = t.amin(dim, keepdim=True), t.amax(dim, keepdim=True)
    step = (high - low) / ((1 << bits) - 1)
    return step.clamp(max=_HALF_MAX).half(), low.clamp(-_HALF_MAX, _HALF_MAX).half()


def _codes(t: torch.Tensor, step: torch.Tensor, low: torch.Tensor, bits: int) -> torch.Tensor:
    step, low = step.float(), low.float()
    scaled = (t - low) / torch.where(step == 0, 1.0, step)  # a constant channel is all low
    return scaled.round().clamp(0, (1 << bits) - 1).nan_to_num(0.0).to(torch.uint8)


def _check(k: torch.Tensor, v: torch.Tensor, bits: int, block: int) -> None:
    if bits not in BITS:
        raise ArgumentError("bits", bits, "2, 4 or 8", "Choose one of them.")
    if block < 1:
        raise ArgumentError("block", block, "at least 1 slot", "128 is usual.")
    if k.dim() != 4 or not k.is_floating_point():
        raise ArgumentError(
            "k", arguments.given(k), "floating [batch, heads, tokens, head_dim]", "Give keys."
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
        accepted = f"{k.dtype} [{', '.join(map(str, k.shape[:3]))}, head_dim] as k has"
        raise ArgumentError("v", arguments.given(v), accepted, "Keys and values must hold the same tokens.")
    for name, t in (("k", k), ("v", v)):
        if not t.shape[3] or t.shape[3] % (8 // bits):
            raise ArgumentError(
                name,
                f"head_dim {t.shape[3]}",
                f"a multiple of {8 // bits} at {bits} bits, not 0",
                "Use more bits for this layer.",
            )


def block_ends(slots: int, block: int, device: torch.device | None = None, start: int = 0) -> torch.Tensor:
    """`Pool.ends` of `slots` slots in blocks of `block`, the last one shorter, counted from `start`."""
    return torch.tensor(
        [start + min(i + block, slots) for i in range(0, slots, block)], dtype=torch.int32, device=device
    )


def _fake(k, v, bits, block):
    batch, heads, slots, dim = k.shape
    blocks = (slots + block - 1) // block
    return (
        k.new_empty((batch, heads, slots, dim * bits // 8), dtype=torch.uint8),
        k.new_empty((batch, heads, blocks, 2, dim), dtype=torch.float16),
        v.new_empty((batch, heads, slots, v.shape[3] * bits // 8), dtype=torch.uint8),
        v.new_empty((batch, heads, slots, 2), dtype=torch.float16),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)

    def one(label, shape, dim_v, bits, block):
        k = torch.randn(shape, generator=make) * torch.logspace(-2, 2, shape[3])
        v = torch.randn(*shape[:3], dim_v, generator=make)
        return Sample(label, (k.to(device, dtype), v.to(device, dtype), bits, block))

    return [
        one("4 bits, short last block", (2, 2, 70, 32), 32, 4, 32),
        one("2 bits, one block", (1, 3, 20, 16), 24, 2, 128),
        one("8 bits", (1, 1, 9, 10), 10, 8, 4),
        one("no slots", (1, 2, 0, 16), 16, 2, 128),
    ]


@define(
    "kv_quantize(Tensor k, Tensor v, int bits, int block) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    inputs=_samples,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
    plain=plain.QUANTIZE,
    check=_check,
)
def kv_quantize(k, v, bits, block):
    """k_codes, k_affine, v_codes, v_affine of a new pool; its ends are `block_ends(N, block)`.

    k: [B, H, N, D]; v: [B, H, N, Dv]. bits: 2, 4 or 8. block: slots that share a key's step and low.
    Steps and lows are rounded to fp16 first and codes chosen against the rounded ones, so the error
    is at most half a step within the range. Values beyond fp16's range saturate.
    """
    k, v = k.float(), v.float()
    steps, lows, codes = [], [], []
    for part in k.split(block, dim=2) if k.shape[2] else ():
        step, low = _affine(part, 2, bits)
        steps.append(step)
        lows.append(low)
        codes.append(_codes(part, step, low, bits))
    v_step, v_low = _affine(v, 3, bits)
    v_codes = pack(_codes(v, v_step, v_low, bits), bits)
    if not codes:
        empty = _fake(k, v, bits, block)
        return empty[0], empty[1], v_codes, torch.cat([v_step, v_low], dim=3)
    k_affine = torch.stack([torch.cat(steps, 2), torch.cat(lows, 2)], dim=3)
    return pack(torch.cat(codes, 2), bits), k_affine, v_codes, torch.cat([v_step, v_low], dim=3)


def quantize(k: torch.Tensor, v: torch.Tensor, bits: int, block: int) -> Pool:
    """A new pool of these tokens."""
    k_codes, k_affine, v_codes, v_affine = torch.ops.thresher.kv_quantize(k, v, bits, block)
    return Pool(k_codes, k_affine, v_codes, v_affine, block_ends(k.shape[2], block, k.device))


def append(pool: Pool, new: Pool) -> Pool:
    """A pool with the slots of both, `pool`'s first. Both at the same bits."""
    if pool.bits != new.bits:
        raise ArgumentError(
            "new", f"{new.bits} bits", f"{pool.bits} bits as the pool has", "Quantize it alike."
        )
    k_codes, k_affine, v_codes, v_affine = (
        torch.cat(pair, dim=2) for pair in zip(pool[:4], new[:4], strict=True)
    )
    return Pool(k_codes, k_affine, v_codes, v_affine, torch.cat([pool.ends, new.ends + pool.slots]))


def dequantize(pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [B, H, N, D] and values [B, H, N, Dv] of a pool, in fp32."""
    counts = pool.ends.long().diff(prepend=pool.ends.new_zeros(1).long())
    affine = pool.k_affine.float().repeat_interleave(counts, dim=2, output_size=pool.slots)
    k = affine[..., 1, :] + affine[..., 0, :] * unpack(pool.k_codes, pool.bits)
    step, low = pool.v_affine.float().unbind(-1)
    return k, low[..., None] + step[..., None] * unpack(pool.v_codes, pool.bits)
