"""Attention among chosen tokens, zeros for the rest: `thresher::important_attention` (ZipVL, steps 5-6)."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from thresher.errors import ArgumentError
from thresher.ops import Sample, define
from thresher.plain_form import Plain

from .. import arguments
from ..varlen.attention import TOLERANCE, empty_result
from ..varlen.plain import attend


def _check(q, k, v, index, scale) -> None:
    arguments.queries(q, scale)
    batch, tokens = q.shape[0], q.shape[2]
    arguments.keys(q, tokens, k=k, v=v)
    fix = "Take it from thresher::topk_sorted."
    if index.dim() != 2 or index.shape[0] != batch or index.dtype != torch.int64:
        raise ArgumentError("index", arguments.given(index), f"int64 [{batch}, kept]", fix)
    arguments.in_range("index", index, -1, tokens - 1, fix)


def _pick(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` [B, k] of t [B, H, n, D]; -1 takes token 0, which its user must ignore."""
    at = index.clamp_min(0)[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
    return t.gather(2, at)


def _spread(picked: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Zero `out` [B, H, n, D] and put `picked` [B, H, k, D] where `index` says; -1 goes nowhere."""
    batch, heads, tokens, dim = out.shape
    rows = picked.new_zeros((batch, heads, tokens + 1, dim))  # the spare row takes what has no place
    at = torch.where(index < 0, tokens, index)[:, None, :, None].expand_as(picked)
    return out.copy_(rows.scatter_(2, at, picked)[:, :, :tokens])


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)
    cases = [  # label, batch, Hq, Hkv, D, Dv, tokens, index
        ("all", 1, 2, 2, 16, 16, 6, [list(range(6))]),
        ("grouped heads", 2, 8, 2, 32, 32, 40, [[0, 3, 7, 20, 39], [1, 2, 30, 31, 32]]),
        ("rows of different counts", 2, 4, 1, 16, 24, 30, [[0, 5, 9, 29], [12, 29, -1, -1]]),
        ("one token", 1, 4, 4, 20, 20, 9, [[8]]),
    ]
    samples = []
    for label, batch, heads, kv_heads, dim, dim_v, tokens, index in cases:
        q, k, v = (
            torch.randn(batch, tokens, h, d, generator=make).to(device, dtype).transpose(1, 2)
            for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v))
        )
        samples.append(Sample(label, (q, k, v, torch.tensor(index, device=device), dim**-0.5)))
    return samples


def _plain(q, k, v, index, scale):
    return important_attention.reference(q, k, v, index, scale).contiguous()


@define(
    "important_attention(Tensor q, Tensor k, Tensor v, Tensor index, float scale) -> Tensor",
    fake=lambda q, k, v, index, scale: empty_result(q, v),
    inputs=_samples,
    tolerance=TOLERANCE,
    providers=("cpu_sdpa", "cuda_sdpa"),
    plain=Plain(run=_plain),
    check=_check,
)
def important_attention(q, k, v, index, scale):
    """Causal attention among the tokens in `index`; every other token's output is zero.

    q: [B, Hq, n, D]; k: [B, Hkv, n, D]; v: [B, Hkv, n, Dv]. Result [B, Hq, n, Dv], stored token-major.
    index: int64 [B, kept], rising, with -1 in places not used, all of them last.
    """
    causal = torch.ones(index.shape[1], index.shape[1], dtype=torch.bool, device=q.device).tril()
    picked = attend(_pick(q, index), _pick(k, index), _pick(v, index), scale, mask=causal)
    return _spread(picked, index, empty_result(q, v))


def _important_attention_sdpa(q, k, v, index, scale):
    # Unused places are last, so causality alone keeps them out of every used place's view.
    picked = scaled_dot_product_attention(
        _pick(q, index),
        _pick(k, index),
        _pick(v, index),
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return _spread(picked, index, empty_result(q, v))


def _refuse(q, k, v, index, scale) -> str | None:
    return arguments.refuse_scale(scale)


for _device in ("cpu", "cuda"):
    important_attention.provider(f"{_device}_sdpa", device=_device, supports_args=_refuse)(
        _important_attention_sdpa
    )
