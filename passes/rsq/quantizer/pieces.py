"""What quantization walks through: calibration batches, and the pieces of a model in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...structure.experts import ExpertSite
from ...structure.recover import LayerSite, LinearSite, Structure
from ...tokens.owners import Owners
from ..edits import RotationPlan


@dataclass(frozen=True)
class Batch:
    """inputs: the model's, by name. real: bool [batch, sequence], or None for all real.
    tokens: int64 [batch, sequence] ids, where the model takes ids."""

    inputs: Mapping[str, Any]
    real: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


def seen_from(owners: Owners, node: fx.Node, batch: Batch, known: torch.Tensor) -> Batch:
    """A batch as the tokens of one value have it, `known` being that value: their own ids and padding mask."""
    ids, real = batch.inputs.get(owners.of(node) or ""), real_of(owners, node, batch)
    rows = (known.shape[0], known.shape[2 if known.dim() == 4 else 1])  # heads stand before the tokens
    if real is not None and real.shape != rows and known.dim() > 2:
        real = None  # pooled or subsampled: no longer a value a token
    tokens = ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None
    return dataclasses.replace(batch, real=real, tokens=tokens if tokens is not None else batch.tokens)


def real_of(owners: Owners, node: fx.Node, batch: Batch) -> torch.Tensor | None:
    """bool [batch, sequence], true at the real tokens that a value is made of; None for all."""
    if batch.real is not None and owners.mask(node) == "attention_mask":
        return batch.real  # what the batch says of its own tokens holds, whatever the model is shown of them
    return owners.real(node, batch.inputs)


Site = LinearSite | ExpertSite


@dataclass
class Piece:
    """What is saved together: a layer's linears and experts, or a group outside all layers. groups: linears by input;
    a product by experts is a group of its own."""

    name: str
    layer: LayerSite | None
    groups: list[list[Any]]  # of Site


def pieces(structure: Structure, plan: RotationPlan, order: Mapping[fx.Node, int]) -> Iterator[Piece]:
    """Layers, and groups outside layers, in graph order."""
    found: dict[str, Piece] = {}
    sites: list[Site] = sorted([*plan.quantise, *plan.experts], key=lambda s: order[s.node])
    for site in sites:
        layer = structure.layer_of(site)
        name = site.fqn if layer is None else f"layer-{layer.index:04d}-{layer.fqn}"
        piece = found.setdefault(name, Piece(name, layer, []))
        alone = isinstance(site, ExpertSite)
        same = (g for g in piece.groups if g[0].x is site.x and not isinstance(g[0], ExpertSite))
        group = None if alone else next(same, None)
        if group is None:
            piece.groups.append([site])
        else:
            group.append(site)
    for piece in found.values():
        piece.groups.sort(key=lambda g: max(order[n] for n in reads(g)))
    yield from sorted(found.values(), key=lambda p: order[p.groups[0][0].x])


def matrix(site: ExpertSite, weight: torch.Tensor) -> torch.Tensor:
    """An expert's weight as [out, in], whichever way the model stores it; and back again."""
    return weight.t() if site.transposed else weight


def reads(group: Sequence[Site]) -> list[fx.Node]:
    """The values that a group's statistics are made of: its input, and of experts whose each row is."""
    chosen = getattr(group[0], "experts", None)
    return [group[0].x, chosen] if isinstance(chosen, fx.Node) else [group[0].x]
