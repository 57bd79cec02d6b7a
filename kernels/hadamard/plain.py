"""The Hadamard transform in plain ATen: products with the two Kronecker factors of its matrix."""

from __future__ import annotations

import torch
from torch import fx

from thresher.formats.hadamard import base_matrix, check_order, sylvester
from thresher.graph.nodes import value
from thresher.plain_form import Plain, Spelling


def rotate(
    x: torch.Tensor, signs: torch.Tensor | None, base: torch.Tensor, power: torch.Tensor
) -> torch.Tensor:
    """`hadamard` with its two Kronecker factors at hand, scaled: two small products and not one large."""
    order, two = base.shape[0], power.shape[0]
    signed = x.to(base.dtype) if signs is None else x.to(base.dtype) * signs.to(base.dtype)
    blocks = signed.reshape(*x.shape[:-1], x.shape[-1] // (order * two), order, two)
    blocks = blocks @ power if two > 1 else blocks
    blocks = base.t() @ blocks if order > 1 else blocks
    return blocks.reshape(x.shape).to(x.dtype)


def factors(block: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthogonal factors of `hadamard.matrix(block)`: Paley's [m, m] and Sylvester's [2^k, 2^k]."""
    _, two = check_order("block", block)
    parts = (base_matrix(block), sylvester(two))
    base, power = ((p.double() / p.shape[0] ** 0.5).to(dtype) for p in parts)
    return base, power


def _hadamard(x, signs, block):
    return rotate(x, signs, *factors(block, torch.promote_types(x.dtype, torch.float32)))


def _spell(spelling: Spelling, node: fx.Node) -> fx.Node:
    """One transform; the factors are weights that all transforms of that order share."""
    x, signs, block = node.args
    wide = torch.promote_types(value(x).dtype, torch.float32)
    held = [
        spelling.constant(f"hadamard.{block}.{str(wide).removeprefix('torch.')}.{number}", node, factor)
        for number, factor in enumerate(factors(block, wide))  # type: ignore[arg-type]
    ]
    return spelling.traced(node, rotate, [x, signs, *held])


PLAIN = Plain(run=_hadamard, spell=_spell)
