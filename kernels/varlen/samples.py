"""Calls of packed attention for tests: what `inputs` of its two operators gives."""

from __future__ import annotations

from typing import Any

import torch

from thresher.ops import Sample


def _qkv(device, dtype, tokens, heads, kv_heads, dim, dim_v=None, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim_v or dim))
    return tuple(
        torch.randn(1, tokens, *shape, generator=make).to(device, dtype).transpose(1, 2) for shape in shapes
    )


def _offsets(device, lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Inputs of `varlen_attention`: causal, windowed and two-sided, grouped heads, empty and equal segments, soft caps."""
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(3)) * 2
    cases: list[tuple[Any, ...]] = [  # label, lengths, (Hq, Hkv, D, Dv), causal, window_left, softcap; sinks
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
        ("sinks", (1, 31, 90), (4, 2, 32, 32), True, -1, 0.0, sinks),
        ("sinks and window", (3, 9, 150), (4, 4, 16, 16), True, 8, 0.0, sinks),
        ("a sink above all scores, two-sided", (5, 40), (4, 1, 16, 16), False, -1, 0.0, sinks + 40),
        ("a sink below all scores", (5, 40), (4, 1, 16, 16), False, -1, 0.0, sinks - 200),
    ]
    if dtype != torch.float32:  # shapes do not act together with dtypes: a few suffice
        cases = cases[:2] + cases[4:8] + cases[12:13]
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
                *(s.to(device, dtype) for s in more),
            ),
        )
        for label, lengths, heads, causal, window, softcap, *more in cases
    ]


def masked_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Inputs of `varlen_attention_masked`: rows with pads at either end and between tokens, and an empty row."""
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
