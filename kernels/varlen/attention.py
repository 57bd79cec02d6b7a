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

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import fx

from thresher.errors import ArgumentError
from thresher.graph.nodes import argument, value
from thresher.graph.token_labels import BATCH, SEQUENCE, Labels, Stop, TokenAxes
from thresher.machine.pricing import AttentionRate, Prices, dtype_of, width_of
from thresher.ops import define

from .plain import PLAIN, PLAIN_MASKED, attend
from .samples import masked_samples, samples

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


def _fake(q, k, v, cu_seqlens, *rest):
    return empty_result(q, v)


def _fake_masked(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    return empty_result(q, v)


def _price(model: Prices, node: fx.Node, causal: bool) -> float:
    """An attention of each sequence to itself alone: the squares of their lengths, not of their sum."""
    q, k, v = node.args[:3]
    heads, width = (model.size(value(q).shape[i]) for i in (1, 3))
    lengths = model.lengths or [model.size(value(q).shape[2])]
    squares = sum(n * n for n in lengths)
    flops = 4 * heads * width * squares / (2 if causal else 1)
    moved = width_of(node) * sum(model.numel(t) for t in (q, k, v, node))
    mean = squares / max(sum(lengths), 1)
    return model.attention(flops, mean, width, dtype_of(node), moved, packed=True)


def _tokens(node: fx.Node, axes: TokenAxes) -> Labels:
    """Every token attends within its own sequence, so a sequence may lose tokens, or be packed with others."""
    expected = (BATCH, None, SEQUENCE, None)
    if any(axes.get(a) != expected for a in node.args[:3]):
        raise Stop("attends over another layout than [1, heads, tokens, head_dim]")
    if argument(node, "window_left") != -1:
        raise Stop("has a window, which counts tokens that would be gone")
    return expected


def _timed(length: int, width: int) -> tuple[Callable[[], torch.Tensor], float]:
    """Four sequences of one length with twelve heads, and their FLOPs."""
    q, k, v = (torch.randn(1, 12, 4 * length, width) for _ in range(3))
    ends = torch.arange(0, 4 * length + 1, length, dtype=torch.int32)
    flops = 4 * 4 * 12 * length * length * width
    return lambda: varlen_attention(q, k, v, ends, length, width**-0.5, False, -1, 0.0), flops


@define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_len, float scale,"
    " bool causal, int window_left, float softcap) -> Tensor",
    fake=_fake,
    inputs=samples,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "cpu_sdpa", "torch_varlen", "triton"),
    price=lambda model, node: _price(model, node, bool(argument(node, "causal"))),
    tokens=_tokens,
    plain=PLAIN,
    rates=[AttentionRate("varlen_attention.float32", _timed)],
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


@define(
    "varlen_attention_masked(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor rows, Tensor cols,"
    " Tensor cu_seqlens, SymInt max_len, float scale) -> Tensor",
    fake=_fake_masked,
    inputs=masked_samples,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "cpu_sdpa", "triton"),
    price=lambda model, node: _price(model, node, False),
    plain=PLAIN_MASKED,
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
