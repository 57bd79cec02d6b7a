"""Where a model's positions are, so that the tokens kept behind a cut can be given new ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program

from ..structure.recover import LayerSite
from ..tokens.axes import TokenAxes
from ..tokens.segments import caller
from ..tokens.types import NotPrunable


def position_tables(program: Program, layers: Sequence[LayerSite], axes: TokenAxes) -> frozenset[fx.Node]:
    """The rotary tables of these layers, and what is made of them before they meet the tokens. Raises NotPrunable."""
    found: set[fx.Node] = set()
    for layer in layers:
        site = layer.attention
        if site is None or site.rope is None:
            raise NotPrunable(
                f"{layer.fqn} has no rotary positions to renumber: those a model learned are in its embeddings, before"
                " any layer. position='kept' keeps them."
            )
        if site.window is not None:
            raise NotPrunable(
                f"{layer.fqn} sees a window of {site.window + 1} tokens, counted by the positions they had in the"
                " prompt. position='kept' keeps them."
            )
        found |= {site.rope.cos, site.rope.sin}
    outside = caller(program)
    for place, name in zip(outside.placeholders, outside.input_names):
        known = value(place)
        if isinstance(known, torch.Tensor) and known.dim() > 2 and not known.is_floating_point():
            raise NotPrunable(
                f"{name} {list(known.shape)} gives tokens positions on several axes, which have no single order to be"
                " renumbered in. position='kept' keeps them."
            )
    for node in program.nodes():
        if node not in axes and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return frozenset(found)
