"""Attention over a cache whose older part is quantized: `thresher::kv_attention`.

Slots are the pools' slots in the order given (see `kv_format`), then the tail's. Rotated keys carry
their position themselves, so pools may hold tokens in any order.
"""

from __future__ import annotations

import torch
from torch import fx

from thresher.errors import ArgumentError
from thresher.graph.nodes import argument, value
from thresher.ops import Sample, define
from thresher.pricing import Prices, dtype_of, width_of

from .. import arguments
from ..varlen.attention import empty_result
from ..varlen.plain import attend
from . import plain
from .format import as_pools, check_pool, dequantize, quantize

# All arithmetic is fp32 from the same codes; half types round q, the tail and the result only.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(q, pools, k_tail, v_tail, visible, scale) -> None:
    """Raise ArgumentError unless the tensors fit together; the ends of blocks are read on a CPU."""
    arguments.queries(q, scale)
    arguments.keys(q, k_tail=k_tail, v_tail=v_tail)
    batch, heads, tail, width = v_tail.shape
    if tail < q.shape[2]:
        given = f"{tail} tokens"
        accepted = f"at least the {q.shape[2]} tokens that ask"
        raise ArgumentError("k_tail", given, accepted, "Append the new tokens to the tail before asking.")
    slots = tail
    for pool in as_pools(pools):
        check_pool(pool, batch, heads, q.shape[3], width)
        slots += pool.slots
    if visible is not None and (visible.shape != (batch, slots) or visible.dtype != torch.bool):
        accepted = f"bool [{batch}, {slots}]"
        raise ArgumentError("visible", arguments.given(visible), accepted, "Mark each slot.")


def sees(queries: int, slots: int, visible: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """bool [B or 1, 1, queries, slots]: which slots each query sees, right-aligned."""
    last = slots - queries + torch.arange(queries, device=device)
    mask = (torch.arange(slots, device=device) <= last[:, None])[None, None]
    return mask if visible is None else mask & visible[:, None, None]


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)

    def tokens(batch, heads, n, dim):
        return torch.randn(batch, n, heads, dim, generator=make).to(device, dtype).transpose(1, 2)

    def one(label, batch, heads, kv_heads, dim, dim_v, queries, sizes, tail, block=32, hidden=False):
        pools: list[torch.Tensor] = []
        for slots, bits in sizes:
            keys, values = (tokens(batch, kv_heads, slots, d) for d in (dim, dim_v))
            pools.extend(quantize(keys, values, bits, block))
        visible = None
        if hidden:
            slots = sum(n for n, _ in sizes) + tail
            visible = (torch.rand(batch, slots, generator=make) < 0.7).to(device)
            visible[-1] = False  # a row that sees nothing
        rest = (tokens(batch, kv_heads, tail, d) for d in (dim, dim_v))
        q = tokens(batch, heads, queries, dim)
        return Sample(label, (q, pools, *rest, visible, dim**-0.5))

    return [
        one("decode", 1, 8, 2, 64, 64, 1, [(50, 4), (130, 2)], 17),
        one("second turn", 2, 4, 2, 64, 64, 9, [(40, 4), (33, 2)], 20),
        one("hidden slots", 2, 4, 4, 64, 64, 3, [(40, 4), (33, 2)], 5, hidden=True),
        one("no unimportant tokens", 1, 4, 1, 64, 64, 1, [(40, 4), (0, 2)], 3),
        one("no pools", 1, 4, 2, 64, 64, 4, [], 30),
        one("odd widths", 1, 2, 1, 20, 12, 2, [(70, 4), (40, 2), (9, 8)], 4, block=7),
        one("many queries", 1, 4, 2, 64, 64, 70, [(30, 4), (20, 2)], 75, hidden=True),
        one("long", 1, 4, 2, 64, 64, 1, [(300, 4), (700, 2)], 100, block=128),
    ]


def _price(model: Prices, node: fx.Node) -> float:
    """A few queries over a cache: the share of its slots that the mask shows, where the rows' lengths are known."""
    q, tail = node.args[0], argument(node, "k_tail")
    rows, heads, queries, width = (model.size(s) for s in value(q).shape)
    slots = model.size(value(tail).shape[2])
    seen = sum(model.lengths) / max(rows, 1) if model.lengths and len(model.lengths) == rows else slots
    seen = min(seen, slots)
    flops = 4 * rows * heads * queries * seen * width
    moved = 2 * width_of(q) * model.numel(tail) * seen / max(slots, 1)
    return model.attention(flops, seen, width, dtype_of(q), moved, packed=False)


@define(
    "kv_attention(Tensor q, Tensor[] pools, Tensor k_tail, Tensor v_tail, Tensor? visible, float scale)"
    " -> Tensor",
    fake=lambda q, pools, k_tail, v_tail, visible, scale: empty_result(q, v_tail),
    inputs=_samples,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "cpu_sdpa", "cuda_triton"),
    price=_price,
    plain=plain.ATTENTION,
    check=check,
)
def kv_attention(q, pools, k_tail, v_tail, visible, scale):
    """Attention of the newest tokens over quantized pools and a full-precision tail.

    q: [B, Hq, m, D], the m newest tokens, whose keys and values stand last in the tail.
    pools: five tensors for each pool, as `kv_format.Pool` orders them; every slot is in the past.
    k_tail, v_tail: [B, Hkv, t, D] and [B, Hkv, t, Dv] in q's dtype, t >= m. Query i sees the tail up
        to its own token (t - m + i): right-aligned, where `is_causal` would align left.
    visible: bool [B, slots] or None, false for padding. A query that sees nothing gives zeros.
    Result [B, Hq, m, Dv], stored token-major.
    """
    found = as_pools(pools)
    wide = torch.promote_types(q.dtype, torch.float32)  # a proof runs it in float64
    parts = [dequantize(pool) for pool in found] + [(k_tail, v_tail)]
    k, v = (torch.cat([t.to(wide) for t in side], dim=2) for side in zip(*parts, strict=True))
    mask = sees(q.shape[2], k.shape[2], visible, q.device)
    out = empty_result(q, v_tail)
    return out.copy_(attend(q.to(wide), k, v, scale, mask=mask))
