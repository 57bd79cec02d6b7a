"""A file's codes in the program: as weights of its own, and the products by a mixture's experts that read them.

matched:  one product by all of a weight's matrices [experts, ...] (structure/experts.py) that the file has codes of
becomes:  `thresher::wna16_expert_linear` (`thresher::nvfp4_expert_linear` for the NVFP4 grid)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thresher.graph.edit import replace
from thresher.graph.program import Program, Weight

from ..base import Match, Miss
from ..structure.experts import ExpertSite, rows_of

ops = torch.ops.thresher
NO_CODES = "The file holds no codes for it: it was kept, or the quantized graph did not have it."
AS_IT_IS = "as it is"  # what codes were made for where nothing is rotated
STORED = ("codes", "scales", "zeros", "block_scales", "global_scale")


@dataclass(frozen=True)
class CodedExperts:
    """A product by experts, its codes by name, and the bytes of its weight and of these."""

    site: ExpertSite
    tensors: Mapping[str, torch.Tensor]
    sizes: tuple[int, int]


def sizes_of(held: Weight, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Bytes of a weight, and of the codes that replace it."""
    after = sum(t.numel() * t.element_size() for n, t in tensors.items() if n in STORED)
    return held.tensor.numel() * held.tensor.element_size(), after


def coded_weights(fqn: str, tensors: Mapping[str, torch.Tensor], held: Weight) -> dict[str, Weight]:
    """The file's tensors as weights that belong to the model's: a changed model is noticed, not recomputed."""
    device = held.tensor.device
    return {
        name: Weight(f"{fqn}.rsq_{name}", tensors[name].to(device), held.origins, None, held.origin_tensors)
        for name in STORED
        if name in tensors
    }


def match_experts(
    program: Program,
    groups: Sequence[Sequence[ExpertSite]],
    stats: Mapping[str, Mapping[str, torch.Tensor]],
) -> list[Match | Miss]:
    """A Match for each weight of experts that the file has codes of, or a Miss. groups: all products by one weight."""
    found: list[Match | Miss] = []
    for group in groups:
        site, held = group[0], program.weights[group[0].weight]
        tensors = stats.get(site.fqn)
        size = f"{site.count} matrices of {site.out_features} x {site.in_features} weights"
        if tensors is None:
            found.append(Miss(site.fqn, f"{NO_CODES} They are {size}."))
        elif tuple(tensors["codes"].shape[:2]) != (site.count, site.out_features):
            shape = list(tensors["codes"].shape)
            found.append(Miss(site.fqn, f"Its codes are {shape}, and the experts are {size}."))
        elif len(group) > 1 or isinstance(site.experts, int):
            found.append(Miss(site.fqn, f"Its {size} are multiplied in several places or one alone, and its codes "
                                        "serve one product by all of them."))  # fmt: skip
        else:
            found.append(
                Match(site.fqn, CodedExperts(site, tensors, sizes_of(held, tensors)), claims=held.origins)
            )
    return found


def put_experts(program: Program, data: CodedExperts) -> None:
    """The product with codes in the place of the one with the weight, in place."""
    site, tensors = data.site, data.tensors
    made = coded_weights(site.fqn, tensors, program.weights[site.weight])
    names = {n: program.add_weight(w) for n, w in made.items()}
    nodes = {n: program.read_weight(name, site.node) for n, name in names.items()}
    chosen = rows_of(program, site)
    args: tuple[Any, ...]
    if "block_scales" in nodes:
        target = ops.nvfp4_expert_linear.default
        args = (nodes["codes"], nodes["block_scales"], nodes["global_scale"], chosen, "exact")
    else:
        target = ops.wna16_expert_linear.default
        groups = tensors["scales"].shape[2]
        group = -1 if groups == 1 else site.in_features // groups
        args = (nodes["codes"], nodes["scales"], nodes.get("zeros"), chosen, int(tensors["bits"]), group)
    node = program.insert(site.node, target, site.x, *args)
    replace(site.node, node)
