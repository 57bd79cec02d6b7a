"""Which linears and which experts of a program RSQ can quantise, and why not the others, in sentences for the report."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thresher.compat import has_values
from thresher.graph.nodes import value
from thresher.graph.program import Program

from ..structure.experts import ExpertSite
from ..structure.recover import LinearSite
from .config import RSQConfig

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unfit(program: Program, site: LinearSite, config: RSQConfig, calls: int = 1) -> str | None:
    """Why a linear cannot be quantised, or None. calls: how often the model calls it."""
    weight = program.weights[site.weight].tensor
    x, y = value(site.x), value(site.output)
    if x.dtype not in _FLOATS or y.dtype != x.dtype:
        return (
            f"It turns {x.dtype} into {y.dtype}; the operators take floating activations and return the same."
        )
    reason = _ungrouped(site.in_features, config)
    if reason is not None:
        return f"{reason[0]} its {site.in_features} inputs; {reason[1]}"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"Its weight is stored as {weight.dtype}; fp32, bf16 and fp16 can be quantised."
    if program.weights[site.weight].source:
        return f"{site.weight_fqn} was already rewritten by another pass."
    if site.tied and site.role not in ("head",) and _read_by_linears(program, site) > calls:
        return f"{site.weight_fqn} is shared with another linear, which would need its own codes."
    if has_values(weight):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            return f"{site.weight_fqn} has {bad} NaN or infinite values; repair the weight."
    return None


def unfit_experts(program: Program, group: Sequence[ExpertSite], config: RSQConfig) -> str | None:
    """Why experts cannot be quantised, by their size, or None. group: all products by one weight's matrices."""
    site = group[0]
    held, x, y = program.weights[site.weight], value(site.x).dtype, value(site.output).dtype
    size = f"{site.count} matrices of {site.out_features} x {site.in_features} weights"
    if len(group) > 1 or isinstance(site.experts, int):
        places = f"in {len(group)} places" if len(group) > 1 else "one alone"
        return f"Its {size} are multiplied {places}; one product by all of them is quantised."
    if x not in _FLOATS or y != x:
        return f"Its {size} turn {x} into {y}; the operators take floating activations and return the same."
    if not held.tensor.is_floating_point() or held.tensor.element_size() < 2:
        return f"Its {size} are stored as {held.tensor.dtype}; fp32, bf16 and fp16 can be quantised."
    if held.source:
        return f"Its {size} were already rewritten by another pass."
    reason = _ungrouped(site.in_features, config)
    if reason is not None:
        return f"{reason[0]} the {site.in_features} inputs of its {size}; {reason[1]}"
    if has_values(held.tensor):
        bad = sum(int((~torch.isfinite(matrix)).sum()) for matrix in held.tensor)
        if bad:
            return f"{site.fqn} has {bad} NaN or infinite values in its {size}; repair the weight."
    return None


def _ungrouped(inputs: int, config: RSQConfig) -> tuple[str, str] | None:
    """How a sentence about groups that do not divide so many inputs begins and ends; None where they do."""
    group = 16 if config.grid == "nvfp4" else config.group_size
    if group <= 0 or inputs % group == 0:
        return None
    fits = [g for g in (128, 64, 32) if inputs % g == 0]
    return f"Groups of {group} do not divide", f"{fits[0]} does." if fits else "use group_size=-1."


def _read_by_linears(program: Program, site: LinearSite) -> int:
    node = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == site.weight)
    return sum(u.target is not torch.ops.aten.embedding.default for u in node.users)
