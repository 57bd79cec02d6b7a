"""Attention over quantized caches, and their quantization, in plain ATen: codes are unpacked by division, blocks of
slots found by comparing."""

from __future__ import annotations

import torch

from thresher.plain_form import Plain

from ..varlen.plain import attend


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """`kv.format.unpack` in arithmetic: codes as int32 [..., D]."""
    wide = packed.int()
    parts = [torch.div(wide, 1 << s, rounding_mode="floor") % (1 << bits) for s in range(0, 8, bits)]
    return torch.cat(parts, -1)


def _kv_attention(q, pools, k_tail, v_tail, visible, scale):
    keys, values = [], []
    for k_codes, k_affine, v_codes, v_affine, ends in zip(*(pools[i::5] for i in range(5))):
        bits = 8 * k_codes.shape[3] // k_affine.shape[4]
        block = (torch.arange(k_codes.shape[2], device=q.device)[:, None] >= ends[None]).sum(1)
        affine = k_affine.float().index_select(2, block)
        keys.append(affine[..., 1, :] + affine[..., 0, :] * unpack_bits(k_codes, bits))
        step, low = v_affine.float().unbind(-1)
        values.append(low[..., None] + step[..., None] * unpack_bits(v_codes, bits))
    k, v = torch.cat([*keys, k_tail.float()], 2), torch.cat([*values, v_tail.float()], 2)
    slots, queries = k.shape[2], q.shape[2]
    last = slots - queries + torch.arange(queries, device=q.device)
    mask = (torch.arange(slots, device=q.device) <= last[:, None])[None, None]
    mask = mask if visible is None else mask & visible[:, None, None]
    return attend(q.float(), k, v, scale, mask=mask).to(q.dtype)


def _kv_quantize(k, v, bits, block):
    def codes(t, step, low):
        step, low = step.half().float(), low.half().float()
        scaled = ((t - low) / torch.where(step == 0, torch.ones_like(step), step)).round()
        scaled = scaled.clamp(0, (1 << bits) - 1)
        return torch.where(scaled.isnan(), torch.zeros_like(scaled), scaled).int()

    def packed(c):
        parts = c.unflatten(-1, (8 // bits, -1)).unbind(-2)
        return sum(p * (1 << (bits * i)) for i, p in enumerate(parts)).to(torch.uint8)

    def affine(t, dim):
        low, high = t.amin(dim, keepdim=True), t.amax(dim, keepdim=True)
        step = ((high - low) / ((1 << bits) - 1)).clamp(max=65504.0)
        return step, low.clamp(-65504.0, 65504.0)

    k, v = k.float(), v.float()
    slots = k.shape[2]
    blocks = (slots + block - 1) // block
    # the last slot stands in for those that its block lacks: it changes no block's extremes
    filled = torch.arange(blocks * block, device=k.device).clamp(max=slots - 1)
    in_blocks = k.index_select(2, filled).reshape(*k.shape[:2], blocks, block, k.shape[3])
    step, low = affine(in_blocks, 3)
    flat = codes(in_blocks, step, low).reshape(*k.shape[:2], blocks * block, k.shape[3])[:, :, :slots]
    v_step, v_low = affine(v, 3)
    k_affine = torch.cat([step, low], 3).half()
    return packed(flat), k_affine, packed(codes(v, v_step, v_low)), torch.cat([v_step, v_low], 3).half()


ATTENTION, QUANTIZE = Plain(run=_kv_attention), Plain(run=_kv_quantize)
