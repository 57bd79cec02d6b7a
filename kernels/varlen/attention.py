"""Attention over packed sequences: `thresher::varlen_attention` and `thresher::varlen_attention_masked`.

A packed batch is one row of T tokens, cut into segments by `cu_seqlens`; a token sees only tokens
of its own segment. Results never depend on what stands in another segment: replacing one, NaN
included, leaves every other bit-identical.

Layouts, for both operators:
    q             [1, Hq, T, D], any strides (in models: a transposed view of [1, T, Hq, D])
    k, v          [1, Hkv, T, D] and [1, Hkv, T, Dv], Hq a multiple of Hkv
    cu_seqlens    int32 [segments + 1], from 0 to T, never falling; a repeated offset is an empty segment
    max_len       no segment is longer; any upper bound will do
    result        [1, Hq, T, Dv], stored token-major, so that `transpose(1, 2).reshape(1, T, -1)` is free
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from thresher.errors import ArgumentError
from thresher.ops import Sample, define

# Both compute in fp32 and round once; providers for half types round the probabilities as well.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def empty_result(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The uninitialised [1, Hq, T, Dv] result, stored as [1, T, Hq, Dv]."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def bounds(cu_seqlens: torch.Tensor, tokens: int) -> list[int]:
    """`cu_seqlens` as a list, checked against the number of tokens. Waits for the device."""
    ends = cu_seqlens.tolist()
    rises = all(a <= b for a, b in pairwise(ends))
    if not ends or ends[0] != 0 or ends[-1] != tokens or not rises:
        raise ArgumentError(
            "cu_seqlens",
            ends if len(ends) <= 9 else f"{len(ends)} offsets from {ends[0]} to {ends[-1]}",
            f"offsets that never fall, from 0 to the number of tokens ({tokens})",
            "Take it from thresher.runtime.packing.plan.plan.",
        )
    return ends


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Raise ArgumentError unless the tensors fit together. Reads metadata only."""
    if q.dim() != 4 or q.shape[0] != 1:
        raise ArgumentError("q", f"shape {tuple(q.shape)}", "[1, heads, tokens, head_dim]", "Pack it first.")
    for name, t in (("k", k), ("v", v)):
        if t.dim() != 4 or t.shape[0] != 1 or t.shape[2] != q.shape[2] or q.shape[1] % t.shape[1]:
            raise ArgumentError(
                name,
                f"shape {tuple(t.shape)}",
                f"[1, kv_heads, {q.shape[2]}, head_dim] with kv_heads a divisor of {q.shape[1]}",
                "Queries, keys and values must hold the same packed tokens.",
            )
    if k.shape[1] != v.shape[1] or k.shape[3] != q.shape[3]:
        raise ArgumentError(
            "k",
            f"shape {tuple(k.shape)}",
            f"{v.shape[1]} heads as v has and head_dim {q.shape[3]} as q has",
            "Pass the keys and values of one layer.",
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ArgumentError(
            "cu_seqlens",
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}",
            "int32 [segments + 1]",
            "Take it from thresher.runtime.packing.plan.plan.",
        )


def visible(length: int, causal: bool, window_left: int, device: torch.device) -> torch.Tensor | None:
    """bool [length, length], true where query i sees key j; None where each sees all."""
    if not causal and window_left < 0:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window_left < 0 else seen & (distance.abs() <= window_left)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(softcap(q k^T * scale) + mask) v in at least fp32; a query that sees nothing gives zeros.

    mask: bool (true = visible) or float (added), broadcastable to [1, Hq, queries, keys].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = (q.to(wide) * scale) @ k.transpose(-1, -2)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1)
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return (weights.masked_fill(blind, 0.0) @ v).to(q.dtype)


def _fake(q, k, v, cu_seqlens, *rest):
    return empty_result(q, v)


def _fake_masked(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    return empty_result(q, v)


def _qkv(device, dtype, tokens, heads, kv_heads, dim, dim_v=None, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim_v or dim))
    return tuple(
        torch.randn(1, tokens, *shape, generator=make).to(device, dtype).transpose(1, 2) for shape in shapes
    )


def _offsets(device, lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    cases = [  # label, lengths, (Hq, Hkv, D, Dv), causal, window_left, softcap
        ("causal", (5, 1, 37, 130), (4, 4, 32, 32), True, -1, 0.0),
        ("bidirectional", (64, 65, 2), (4, 4, 16, 16), False, -1, 0.0),
        ("grouped heads, empty segments", (0, 9, 0, 0, 40, 0), (6, 2, 64, 64), True, -1, 0.0),
        ("one kv head, equal lengths", (16, 16, 16, 3, 16), (4, 1, 32, 32), True, -1, 0.0),
        ("window below, at and above the length", (3, 8, 9, 150), (4, 2, 16, 16), True, 8, 0.0),
        ("two-sided window", (3, 5, 200), (2, 2, 16, 16), False, 4, 0.0),
        ("window of one", (7, 70), (2, 2, 16, 16), True, 0, 0.0),
        ("softcap", (31, 90), (4, 2, 32, 32), True, -1, 2.0),
        ("softcap and window", (31, 90), (4, 2, 32, 32), True, 16, 2.0),
        ("value width differs", (12, 33), (2, 2, 32, 24), False, -1, 0.0),
        ("odd head width", (12, 33), (2, 1, 20, 20), True, -1, 0.0),
        ("no tokens", (0, 0), (2, 2, 16, 16), True, -1, 0.0),
    ]
    if dtype != torch.float32:  # shapes do not act together with dtypes: a few suffice
        cases = cases[:2] + cases[4:8]
    return [
        Sample(
            label,
            (
                *_qkv(device, dtype, sum(lengths), *heads),
                _offsets(device, lengths),
                max(lengths),
                heads[2] ** -0.5,
                causal,
                window,
                softcap,
            ),
        )
        for label, lengths, heads, causal, window, softcap in cases
    ]


@define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_len, float scale,"
    " bool causal, int window_left, float softcap) -> Tensor",
    fake=_fake,
    inputs=_samples,
    tolerance=TOLERANCE,
)
def varlen_attention(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap):
    """Attention within each segment.

    causal: query i sees keys j <= i of its segment, else all of them.
    window_left: -1 for no window; else only keys with i - j <= window_left (causal) or
        |i - j| <= window_left (not causal). Positions count real tokens; where a mask has holes and
        the window counts columns, use `varlen_attention_masked`.
    softcap: 0 for none; else scores become softcap * tanh(scores / softcap).
    """
    check_shapes(q, k, v, cu_seqlens)
    out = empty_result(q, v)
    ends = bounds(cu_seqlens, q.shape[2])
    for begin, end in segments(ends):
        q_s, k_s, v_s = (t[:, :, begin:end] for t in (q, k, v))
        mask = visible(end - begin, causal, window_left, q.device)
        out[:, :, begin:end] = attend(q_s, k_s, v_s, scale, softcap, mask)
    return out


def segments(ends: list[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each segment that is not empty."""
    return ((begin, end) for begin, end in pairwise(ends) if end > begin)


def check_mask(q: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> None:
    """Raise ArgumentError unless the mask and the token coordinates fit `q`. Reads metadata only."""
    if mask.dim() != 4 or mask.shape[1] not in (1, q.shape[1]):
        raise ArgumentError(
            "mask",
            f"shape {tuple(mask.shape)}",
            f"[batch or 1, {q.shape[1]} or 1, queries, keys]",
            "Pass the mask of the padded batch.",
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ArgumentError("mask", str(mask.dtype), "bool or a floating dtype", "Convert it first.")
    for name, index in (("rows", rows), ("cols", cols)):
        if index.dim() != 1 or index.shape[0] != q.shape[2] or index.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                name,
                f"{index.dtype} {tuple(index.shape)}",
                f"an integer index for each of the {q.shape[2]} tokens",
                "Take it from thresher.runtime.packing.plan.plan.",
            )


def _masked_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(1)
    batch, width, heads, kv_heads, dim = 4, 40, 4, 2, 16
    holed = torch.rand(batch, width, generator=make) < 0.6
    holed[2] = False  # an empty row
    left = torch.arange(width) >= torch.tensor([[30], [0], [39], [12]])
    bias = torch.randn(1, heads, width, width, generator=make)
    prefix = torch.ones(width, width).tril().bool()
    prefix[:, :10] = True
    causal = torch.ones(width, width).tril().bool()
    cases = [  # label, padding mask, attention mask, filler tokens
        ("relative bias, holes", holed, bias, 0),
        ("causal and left padding", left, causal[None, None] & left[:, None, None], 0),
        ("prefix, filler", holed, prefix[None, None], 5),
        (
            "additive -inf for each row",
            left,
            torch.zeros(batch, 1, width, width).masked_fill(~causal, -torch.inf),
            3,
        ),
        ("sees nothing", left, torch.zeros(1, 1, width, width, dtype=torch.bool), 0),
    ]
    samples = []
    for label, real, mask, filler in cases:
        rows, cols = real.nonzero(as_tuple=True)
        lengths = real.sum(1).tolist() + [filler]
        rows = torch.cat([rows, torch.full((filler,), -1)])
        cols = torch.cat([cols, torch.zeros(filler, dtype=torch.int64)])
        qkv = _qkv(device, dtype, sum(lengths), heads, kv_heads, dim, seed=2)
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        args = (mask.to(device), rows.to(device), cols.to(device), _offsets(device, lengths))
        samples.append(Sample(label, (*qkv, *args, max(lengths), dim**-0.5)))
    return samples


@define(
    "varlen_attention_masked(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor rows, Tensor cols,"
    " Tensor cu_seqlens, SymInt max_len, float scale) -> Tensor",
    fake=_fake_masked,
    inputs=_masked_samples,
    tolerance=TOLERANCE,
)
def varlen_attention_masked(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    """Attention within each segment under the padded batch's own mask, whatever it holds.

    For position biases, prefixes and holes: segment tokens take the mask's entries at their real
    coordinates, so no structure of the mask need be known.

    mask: bool (true = visible) or float (added to the scores), [batch or 1, Hq or 1, S, S].
    rows, cols: integers [T], the batch row and the column each packed token came from. A segment
        holds tokens of one row, columns rising. Row -1 marks filler, which sees only itself.
    """
    check_shapes(q, k, v, cu_seqlens)
    check_mask(q, mask, rows, cols)
    out = empty_result(q, v)
    for begin, end in segments(bounds(cu_seqlens, q.shape[2])):
        q_s, k_s, v_s = (t[:, :, begin:end] for t in (q, k, v))
        row = int(rows[begin])
        if row < 0:
            out[:, :, begin:end] = v_s.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            continue
        at = cols[begin:end].long()
        cut = mask[row if mask.shape[0] > 1 else 0][None, :, at][..., at]
        out[:, :, begin:end] = attend(q_s, k_s, v_s, scale, mask=cut)
    return out
