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
from thresher.ops import define
from thresher.pricing import AttentionRate, Prices, dtype_of, width_of

from .. import arguments
from ..derived import derived
from .plain import PLAIN, PLAIN_MASKED, attend
from .samples import masked_samples, samples

# Both compute in fp32 and round once; providers for half types round the probabilities as well.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_FROM_PLAN = "Take it from thresher.runtime.packing.plan.plan."
_ANY = (1 << 62) - 1


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
            _FROM_PLAN,
        )
    return ends


def check(q, k, v, cu_seqlens, max_len, scale, causal=False, window_left=-1, softcap=0.0, sinks=None) -> None:
    """Raise ArgumentError unless the tensors fit together; offsets are read on a CPU."""
    arguments.queries(q, scale, batch=1)
    arguments.keys(q, q.shape[2], k=k, v=v)
    arguments.rising("cu_seqlens", cu_seqlens, q.shape[2], _FROM_PLAN)
    if sinks is not None and (
        sinks.dim() != 1 or sinks.shape[0] != q.shape[1] or not sinks.is_floating_point()
    ):
        accepted = f"a floating number for each of the {q.shape[1]} query heads"
        raise ArgumentError("sinks", arguments.given(sinks), accepted, "Pass the model's own, one a head.")


def visible(length: int, causal: bool, window_left: int, device: torch.device) -> torch.Tensor | None:
    """bool [length, length], true where query i sees key j; None where each sees all."""
    if not causal and window_left < 0:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window_left < 0 else seen & (distance.abs() <= window_left)


def _fake(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None):
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
    " bool causal, int window_left, float softcap, Tensor? sinks=None) -> Tensor",
    fake=_fake,
    inputs=samples,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "cpu_sdpa", "torch_varlen", "triton"),
    price=lambda model, node: _price(model, node, bool(argument(node, "causal"))),
    tokens=_tokens,
    plain=PLAIN,
    rates=[AttentionRate("varlen_attention.float32", _timed)],
    check=check,
)
def varlen_attention(q, k, v, cu_seqlens, max_len, scale, causal, window_left, softcap, sinks=None):
    """Attention within each segment.

    causal: query i sees keys j <= i of its segment, else all of them.
    window_left: -1 for no window; else only keys with i - j <= window_left (causal) or
        |i - j| <= window_left (not causal). Positions count real tokens; where a mask has holes and
        the window counts columns, use `varlen_attention_masked`.
    softcap: 0 for none; else scores become softcap * tanh(scores / softcap).
    sinks: float [Hq] or None; a score of each head beside its keys' scores, which takes its share of the softmax and
        has no value (GPT-OSS). The soft cap does not reach it.
    """
    out = empty_result(q, v)
    ends = bounds(cu_seqlens, q.shape[2])
    for begin, end in segments(ends):
        q_s, k_s, v_s = (t[:, :, begin:end] for t in (q, k, v))
        mask = visible(end - begin, causal, window_left, q.device)
        out[:, :, begin:end] = attend(q_s, k_s, v_s, scale, softcap, mask, sinks)
    return out


def segments(ends: list[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each segment that is not empty."""
    return ((begin, end) for begin, end in pairwise(ends) if end > begin)


def check_masked(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale) -> None:
    """As `check`, and the mask and the tokens' coordinates in it; those too are read on a CPU."""
    check(q, k, v, cu_seqlens, max_len, scale)
    heads, tokens = q.shape[1:3]
    if mask.dim() != 4 or mask.shape[1] not in (1, heads):
        accepted = f"[batch or 1, {heads} or 1, queries, keys]"
        raise ArgumentError("mask", arguments.given(mask), accepted, "Pass the mask of the padded batch.")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ArgumentError("mask", str(mask.dtype), "bool or a floating dtype", "Convert it first.")
    for name, index in (("rows", rows), ("cols", cols)):
        if index.dim() != 1 or index.shape[0] != tokens or index.dtype not in arguments.INTEGERS:
            accepted = f"an integer index for each of the {tokens} tokens"
            raise ArgumentError(name, arguments.given(index), accepted, _FROM_PLAN)
    # One row of mask serves every row of the batch; a mask of nothing serves filler alone.
    last_row = mask.shape[0] - 1 if mask.shape[0] != 1 else _ANY
    arguments.in_range("rows", rows, -1, last_row if mask.numel() else -1, _FROM_PLAN)
    arguments.in_range("cols", cols, 0, max(0, min(mask.shape[2:]) - 1), _FROM_PLAN)
    if cols.device.type == "cpu":  # every layer brings the same tensors: looked at once
        derived("coordinates", _check_coordinates, cols, rows, cu_seqlens)


def _check_coordinates(cols: torch.Tensor, rows: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Raise unless each segment holds tokens of one row, in rising columns; filler may stand anywhere."""
    begins = torch.zeros(rows.shape[0] + 1, dtype=torch.bool)
    begins[cu_seqlens.long()] = True
    falls = (rows[1:] >= 0) & (cols[1:] <= cols[:-1])
    wrong = ~begins[1:-1] & ((rows[1:] != rows[:-1]) | falls)
    if bool(wrong.any()):
        at = int(wrong.int().argmax()) + 1
        given = f"row {int(rows[at])}, column {int(cols[at])} at token {at}, inside a segment"
        raise ArgumentError("rows and cols", given, "tokens of one row, in rising columns", _FROM_PLAN)


@define(
    "varlen_attention_masked(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor rows, Tensor cols,"
    " Tensor cu_seqlens, SymInt max_len, float scale) -> Tensor",
    fake=_fake_masked,
    inputs=masked_samples,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "cpu_sdpa", "triton"),
    price=lambda model, node: _price(model, node, False),
    plain=PLAIN_MASKED,
    check=check_masked,
)
def varlen_attention_masked(q, k, v, mask, rows, cols, cu_seqlens, max_len, scale):
    """Attention within each segment under the padded batch's own mask, whatever it holds.

    For position biases, prefixes and holes: segment tokens take the mask's entries at their real
    coordinates, so no structure of the mask need be known.

    mask: bool (true = visible) or float (added to the scores), [batch or 1, Hq or 1, S, S].
    rows, cols: integers [T], the batch row and the column each packed token came from. A segment
        holds tokens of one row, columns rising. Row -1 marks filler, which sees only itself.
    """
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
