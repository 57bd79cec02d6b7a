"""Operators of ours in plain ATen that any exporter knows: no loops over data, no bit casts, no views of bytes.

Each function has its operator's signature and meaning; tests compare it with the reference over the
operator's own inputs. References that an exporter can follow as they stand are not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thresher.formats import nvfp4 as nvfp4_format
from thresher.formats.hadamard import base_matrix, check_order, sylvester
from thresher.kernels.nvfp4.linear import INT_LIMITS
from thresher.kernels.nvfp4.quantize import MODES
from thresher.kernels.sparse import down as sparse_down
from thresher.kernels.tokens.attention import important_attention as important
from thresher.kernels.varlen.attention import attend
from thresher.ops import get


def segments(cu_seqlens: torch.Tensor, tokens: Any) -> torch.Tensor:
    """int64 [T]: the number of the segment each packed token lies in."""
    place = torch.arange(tokens, device=cu_seqlens.device)
    return (place[:, None] >= cu_seqlens[None, 1:]).sum(1)


def visible(
    segment: torch.Tensor, positions: torch.Tensor, causal: bool, window: int, dtype: torch.dtype | None
) -> torch.Tensor:
    """The mask of packed attention [1, 1, T, T]: bool, or added to the scores when a dtype is given.

    positions: int64 [T], what causality and the window count in.
    """
    seen = segment[:, None] == segment[None]
    distance = positions[:, None] - positions[None]
    if causal:
        seen = seen & (distance >= 0)
    if window >= 0:
        seen = seen & (distance.abs() <= window)
    return as_mask(seen[None, None], dtype)


def masked(mask, rows, cols, cu_seqlens, dtype: torch.dtype | None) -> torch.Tensor:
    """The mask of `varlen_attention_masked`, [1, H or 1, T, T]: each token's entries at its real coordinates."""
    segment = segments(cu_seqlens, rows.shape[0])
    same = (segment[:, None] == segment[None])[None, None]
    filler = (rows < 0)[None, None]
    itself = same & torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    row = rows.clamp_min(0) if mask.shape[0] != 1 else torch.zeros_like(rows)
    taken = mask.permute(0, 2, 1, 3)[row.long(), cols.long()]  # [T, H, S]
    taken = taken.index_select(2, cols.long()).transpose(0, 1)[None]
    if mask.dtype == torch.bool:
        lone = filler[..., None]
        return as_mask((lone & itself) | (~lone & taken & same), dtype)
    outside = torch.full_like(taken, -torch.inf)
    kept = torch.where(filler[..., None], torch.where(itself, torch.zeros_like(taken), outside), taken)
    return torch.where(same, kept, outside)


def as_mask(seen: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def attend_packed(q, k, v, mask, scale: float, softcap: float = 0.0, blind: bool = False) -> torch.Tensor:
    """Attention under a packed mask. blind: some query may see nothing, and gives zeros."""
    if softcap > 0:
        return attend(q, k, v, scale, softcap, mask)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if not blind:
        return out
    nothing = (~mask if mask.dtype == torch.bool else mask == -torch.inf).all(-1, keepdim=True)
    return out.masked_fill(nothing, 0.0)


def varlen_attention(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap):
    segment = segments(cu_seqlens, q.shape[2])
    place = torch.arange(q.shape[2], device=q.device)
    return attend_packed(q, k, v, visible(segment, place, causal, window_left, None), scale, softcap)


def varlen_attention_masked(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    return attend_packed(q, k, v, masked(mask, rows, cols, cu_seqlens, None), scale, blind=True)


def important_attention(q, k, v, index, scale):
    return important.reference(q, k, v, index, scale).contiguous()


def rotate(
    x: torch.Tensor, signs: torch.Tensor | None, base: torch.Tensor, power: torch.Tensor
) -> torch.Tensor:
    """`hadamard` with its two Kronecker factors at hand, scaled: two small products and not one large."""
    order, two = base.shape[0], power.shape[0]
    signed = x.to(base.dtype) if signs is None else x.to(base.dtype) * signs.to(base.dtype)
    blocks = signed.reshape(*x.shape[:-1], x.shape[-1] // (order * two), order, two)
    blocks = blocks @ power if two > 1 else blocks
    blocks = base.t() @ blocks if order > 1 else blocks
    return blocks.reshape(x.shape).to(x.dtype)


def factors(block: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthogonal factors of `hadamard.matrix(block)`: Paley's [m, m] and Sylvester's [2^k, 2^k]."""
    _, two = check_order("block", block)
    parts = (base_matrix(block), sylvester(two))
    base, power = ((p.double() / p.shape[0] ** 0.5).to(dtype) for p in parts)
    return base, power


def hadamard(x, signs, block):
    return rotate(x, signs, *factors(block, torch.promote_types(x.dtype, torch.float32)))


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 values to the nearest E2M1 value (ties to the even code, saturating at 6), as fp32."""
    size = x.abs().clamp(max=nvfp4_format.E2M1_MAX)
    code = torch.minimum((size * 2).round(), size.round() + 2)
    code = torch.minimum(code, (size * 0.5).round() + 4)
    value = torch.where(code <= 4, code * 0.5, torch.where(code <= 6, code - 2, 6.0))
    return torch.where(x < 0, -value, value)


def round_activations(x, activations: str, input_scale=None):
    """`kernels.nvfp4.round_activations` without bytes: fp32 values [..., 16B] and a factor for the result."""
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


def rank(scores: torch.Tensor, protected: torch.Tensor | None, pad: torch.Tensor | None) -> torch.Tensor:
    """int64 keys like `kernels.token_select.rank_keys`, in the same order: the larger stays first.

    A stable sort gives each score its rank; the exporters' sort breaks ties by place as torch's does.
    """
    tokens = scores.shape[-1]
    scores = scores.float()
    scores = torch.where(scores.isnan(), -torch.inf, scores) + 0.0
    place = torch.arange(tokens, device=scores.device)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.zeros_like(order).scatter(-1, order, place.expand_as(order))
    key = tokens - 1 - ranks
    if protected is not None:
        key = torch.where(protected, tokens + place, key)
    return key if pad is None else torch.where(pad, -1 - place, key)


def _rising(index: torch.Tensor) -> torch.Tensor:
    return index.sort(dim=-1, stable=True).values


def topk_sorted(scores, protected, pad, k, counts):
    index = rank(scores, protected, pad).topk(k, dim=1).indices
    if counts is None:
        return _rising(index)
    spare = torch.arange(k, device=scores.device) >= counts[:, None]
    index = _rising(torch.where(spare, scores.shape[1], index))
    return torch.where(index == scores.shape[1], -1, index)


def topk_segments(scores, protected, cu_seqlens, counts, k):
    tokens = scores.shape[0]
    segment = segments(cu_seqlens, tokens)
    key = rank(scores[None], protected[None] if protected is not None else None, None)[0]
    # among its own segment, how many tokens rank above
    above = ((key[None] > key[:, None]) & (segment[None] == segment[:, None])).sum(1)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    ends = torch.minimum(counts.long(), lengths).cumsum(0).clamp_max(k)
    kept = torch.cat([ends.new_zeros(1), ends])
    chosen = above < (kept[1:] - kept[:-1])[segment]
    place = torch.arange(tokens, device=scores.device)
    index = torch.where(chosen, tokens - place, -place).topk(k).indices
    return index, kept.to(cu_seqlens.dtype)


def adaptive_count(scores, protected, tau):
    order = rank(scores, protected, None).topk(scores.shape[1], dim=1).indices
    mass = scores.double().gather(1, order).cumsum(1)
    count = (mass < tau * mass[:, -1:]).sum(1) + 1
    if protected is not None:
        count = torch.maximum(count, protected.sum(1))
    return count.clamp(min=1).clamp(max=scores.shape[1])


def draw(spread: int, seed: int) -> torch.Tensor:
    """What `probe_positions` draws for a seed, fp64 [spread]."""
    return torch.rand(spread, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probe_positions(starts, lengths, recent, spread, seed):
    return positions(starts, lengths, recent, draw(spread, seed))


def positions(starts, lengths, recent: int, drawn: torch.Tensor) -> torch.Tensor:
    """`probe_positions` with the draw at hand."""
    spread = drawn.shape[0]
    lengths = lengths.long()[..., None]
    earlier = (lengths - recent).clamp_min(0)
    low, high = ((torch.arange(spread) + i) * earlier // max(spread, 1) for i in (0, 1))
    rows = low + torch.minimum((drawn * (high - low)).long(), (high - low - 1).clamp_min(0))
    rows = torch.where(high > low, rows, -1)
    last = lengths - recent + torch.arange(recent)
    rows = torch.cat([rows, torch.where(last >= 0, last, -1)], dim=-1)
    return torch.where(rows >= 0, rows + starts.long()[..., None], -1).flatten(1)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """`kv_format.unpack` in arithmetic: codes as int32 [..., D]."""
    wide = packed.int()
    parts = [torch.div(wide, 1 << s, rounding_mode="floor") % (1 << bits) for s in range(0, 8, bits)]
    return torch.cat(parts, -1)


def kv_attention(q, pools, k_tail, v_tail, visible, scale):
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


def kv_quantize(k, v, bits, block):
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


def sparse_down_dense(act, weight, scale, bias, threshold, tau, bmax, site):
    return get("sparse_down").reference(act, weight, scale, bias, threshold, tau, bmax, site)


def sparse_mlp_dense(
    gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site
):
    up = torch.nn.functional.linear(x, sparse_down.dequantized(up_weight, up_scale, x.dtype), up_bias)
    up = up.relu() if up_act == "relu" else up
    kept = sparse_down.kept(gate, threshold)
    hidden = torch.where(kept == 0, torch.zeros_like(kept), kept * up)
    return torch.nn.functional.linear(hidden, sparse_down.dequantized(weight, scale, gate.dtype).t(), bias)


PLAIN: dict[str, Callable[..., Any]] = {
    "adaptive_count": adaptive_count,
    "hadamard": hadamard,
    "important_attention": important_attention,
    "kv_attention": kv_attention,
    "kv_quantize": kv_quantize,
    "probe_positions": probe_positions,
    "sparse_down": sparse_down_dense,
    "sparse_mlp": sparse_mlp_dense,
    "topk_segments": topk_segments,
    "topk_sorted": topk_sorted,
    "varlen_attention": varlen_attention,
    "varlen_attention_masked": varlen_attention_masked,
}
AS_DEFINED = ("few_linear", "instruction_positions", "probe_scores", "token_transition", "transition_score",
              "transprune_score")  # fmt: skip
"""Operators whose reference is plain ATen already."""


def plain(name: str) -> Callable[..., Any] | None:
    """An operator in plain ATen, or None when it has no such form (its weights need a form of the target's)."""
    if name in AS_DEFINED:
        return get(name).reference
    return PLAIN.get(name)
