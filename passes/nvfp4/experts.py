"""The experts of a mixture in NVFP4: one weight of several matrices becomes codes and scales for each of them.

matched:  every product by a stored [experts, out, in] (structure/experts.py) whose matrices are large enough
becomes:  `thresher::nvfp4_expert_linear`, on codes [E, out, 8B], block scales [E, out, B] and tensor scales [E]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thresher.compat import has_values
from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.graph.program import Program

from ..base import Match, Miss
from ..structure.experts import ExpertSite, by_weight, rows_of
from .weights import packed_weights

ops = torch.ops.thresher
W4A4 = (
    "Its activations would be in NVFP4 with one scale for a call, and experts have calls of their own; use "
    "activations='exact', 'int16' or 'int8'."
)


@dataclass(frozen=True)
class PackedExperts:
    """All products by one weight's matrices, and the bytes that it takes as it is and packed."""

    sites: tuple[ExpertSite, ...]
    bytes_before: int
    bytes_after: int


def match_experts(
    program: Program, sites: Sequence[ExpertSite], kept: dict[ExpertSite, str], config: Any
) -> list[Match | Miss]:
    """A Match or a Miss for each weight of experts. config: NVFP4Config. kept: those to leave, each with the reason."""
    found: list[Match | Miss] = []
    for group in by_weight(sites):
        first, held = group[0], program.weights[group[0].weight]
        reasons = (kept.get(s) or unfit(program, s, config) for s in group)
        reason = next((r for r in reasons if r is not None), None)
        if reason is not None:
            found.append(Miss(first.fqn, reason))
            continue
        before = held.tensor.numel() * held.tensor.element_size()
        after = first.count * (first.out_features * -(-first.in_features // 16) * 9 + 4)
        found.append(Match(first.fqn, PackedExperts(group, before, after), claims=held.origins))
    return found


def unfit(program: Program, site: ExpertSite, config: Any) -> str | None:
    """Why experts cannot or should not be rewritten, or None."""
    weight, each = program.weights[site.weight].tensor, site.in_features * site.out_features
    size = f"{site.count} matrices of {site.out_features} x {site.in_features} = {each} weights"
    if each < config.min_weights:
        return f"Its {size} are each fewer than min_weights={config.min_weights}: the call would cost more than it saves."
    x = value(site.x)
    if config.activations == "nvfp4":
        return W4A4
    y = value(site.output).dtype
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or y != x.dtype:
        return (
            f"Its {size} turn {x.dtype} into {y}; the operator takes fp32, bf16 or fp16 and returns the same."
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"Its {size} are stored as {weight.dtype}; fp32, bf16 and fp16 can be rounded to NVFP4."
    if has_values(weight) and (bad := int((~torch.isfinite(weight)).sum())):
        return f"{site.fqn} has {bad} NaN or infinite values, which NVFP4 cannot hold; repair the weight."
    return None


def rewrite_experts(
    program: Program,
    packed: PackedExperts,
    quantize: Callable[..., tuple[torch.Tensor, ...]],
    activations: str,
) -> None:
    """Put the low-bit product in the place of every product by this weight, in place."""
    first = packed.sites[0]

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = zip(*(quantize(m.t() if first.transposed else m) for m in tensor))
        return tuple(torch.stack(list(part)) for part in parts)

    names = [program.add_weight(w) for w in packed_weights(program.weights[first.weight], pack)]
    for site in packed.sites:
        chosen = rows_of(program, site)
        held = [program.read_weight(n, site.node) for n in names]
        made = program.insert(site.node, ops.nvfp4_expert_linear.default, site.x, *held, chosen, activations)
        replace(site.node, made)
