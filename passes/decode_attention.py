"""Decoding: attention of one query a row reads the keys its padding mask shows, and each of them once for all heads.

    matched:  scaled_dot_product_attention(q, k, v, mask), q [B, Hq, 1, D], k and v [B, Hkv, S, D] of a cache, mask
              bool [B or 1, 1, 1, S]
    becomes:  thresher::kv_attention(q, [], k, v, mask[:, 0, 0], scale), k and v before they are repeated for each query head

A padded batch decodes over a padded cache: its mask hides the pads, and PyTorch's kernel multiplies by them all the
same. Where rows differ in length that is most of the work. Exact. On a CPU only: GPU kernels split a cache over
blocks of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thresher.graph.dialect import unrepeated_both
from thresher.graph.edit import replace
from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program
from thresher.recipe import PassConfig

from .base import EXACT, Context, Match, Miss, Pass, register_pass
from .structure.sdpa import Attention, attention

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DecodeAttentionConfig(PassConfig):
    """Decoding attention has no options."""

    name = "decode_attention"


@register_pass
class DecodeAttention(Pass[DecodeAttentionConfig]):
    """Reads only the keys that a decoding step's mask shows. See the module's docstring."""

    name, effect = "decode_attention", EXACT
    per_rank = True

    def match(self, program: Program, context: Context[DecodeAttentionConfig]) -> Sequence[Match | Miss]:
        found: list[Match | Miss] = []
        for node in program.nodes(aten.scaled_dot_product_attention.default):
            site = attention(node)
            if not _one_query(site):
                continue
            name, reason = module_fqn(node) or node.name, why_not(site)
            found.append(Match(name, site) if reason is None else Miss(name, reason))
        return found

    def rewrite(self, program: Program, match: Match, context: Context[DecodeAttentionConfig]) -> None:
        site: Attention = match.data
        q, (k, v) = site.q, unrepeated_both(site.k, site.v)
        mask = site.mask
        assert mask is not None
        scale = float(value(q).shape[-1]) ** -0.5 if site.scale is None else site.scale
        insert = functools.partial(program.insert, site.node)
        shown = insert(aten.select.int, insert(aten.select.int, mask, 1, 0), 1, 0)
        rows = value(q).shape[0]
        if str(value(mask).shape[0]) != str(rows):
            count = rows if isinstance(rows, int) else insert(aten.sym_size.int, q, 0)
            shown = insert(aten.expand.default, shown, [count, -1])
        made = insert(torch.ops.thresher.kv_attention.default, q, [], k, v, shown, scale)
        replace(site.node, made)


def _one_query(site: Attention) -> bool:
    queries, keys = value(site.q).shape[-2], value(site.k).shape[-2]
    return isinstance(queries, int) and queries == 1 and not (isinstance(keys, int) and keys == 1)


def why_not(site: Attention) -> str | None:
    """Why a decoding attention stays as it is, as a sentence; None when it need not."""
    q, k, v = (value(n) for n in (site.q, site.k, site.v))
    if site.mask is None:
        return "It has no mask: every key is read, which PyTorch's attention does well."
    mask = value(site.mask)
    if mask.dtype != torch.bool:
        return f"Its mask is {mask.dtype} and added to the scores; a bool mask says which keys are hidden."
    if mask.dim() != 4 or any(not isinstance(n, int) or n != 1 for n in mask.shape[1:3]):
        return f"Its mask of shape {tuple(mask.shape)} differs between heads; the operator takes one row a sequence."
    if q.device.type != "cpu":
        return f"It runs on {q.device.type}, where PyTorch's attention already spreads a long cache over the whole GPU."
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"It attends from {q.dtype} to {k.dtype}; the operator takes fp32, bf16 or fp16 throughout."
    if q.dim() != 4 or q.shape[1] % k.shape[1]:
        return f"Its {q.shape[1]} query heads are no multiple of its {k.shape[1]} key heads."
    return None
