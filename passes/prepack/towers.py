"""Attentions that are not among the packed tokens: another tower's, and those in which it reads this one.

An image's patches, or a decoder's tokens, stay as they are while a padded text or encoder is packed. A decoder's cross
attention reads the packed tokens laid out in rows again, with zeros in the place of pads; that is exact where its mask
hides the pads, and what follows from it is the decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from ..structure.sdpa import MASKED, Attention
from ..tokens.axes import TokenAxes
from .visibility import MaskProbe, padding_patterns


@dataclass
class Outside:
    """attentions: those that run on rows as before and are right there. nodes: all that follows from them alone."""

    attentions: set[fx.Node] = field(default_factory=set)
    nodes: set[fx.Node] = field(default_factory=set)


def outside(
    program: Program, sites: Mapping[fx.Node, Attention], axes: TokenAxes, padding: fx.Node
) -> Outside:
    """What is not among the packed tokens, and needs not be. Attentions that neither this allows nor packing can take
    are not in it."""
    found = Outside()
    hidden: dict[fx.Node | None, bool] = {}
    inside = {n: node for node, site in sites.items() for n in site.inside}
    for node in program.nodes():
        site = sites.get(node)
        held_up = [inside.get(a, a) for a in node.all_input_nodes if inside.get(a, a) in axes.stopped]
        if site is not None:
            held_up = [o for o in (site.q, site.k, site.v) if o in axes.stopped]
        follows = all(a in found.nodes for a in held_up)
        if site is not None and node not in axes and node not in axes.stopped:
            found.attentions.add(node)
        elif node in axes.stopped and site is not None and site.q not in axes and follows:
            if site.k in axes and site.v in axes:
                if site.mask not in hidden:
                    hidden[site.mask] = site.mask is not None and _hides_pads(program, site.mask, padding)
                if hidden[site.mask]:
                    found.attentions.add(node)
                    found.nodes.add(node)
            elif site.k not in axes and site.v not in axes and held_up:
                found.attentions.add(node)
                found.nodes.add(node)
        elif node in axes.stopped and held_up and follows:
            found.nodes.add(node)
    return found


def _hides_pads(program: Program, mask: fx.Node, padding: fx.Node) -> bool:
    """Whether a mask [rows, heads, queries, keys] shows no query a pad key, whatever other inputs hold."""
    probe = MaskProbe(program, mask, padding)
    if probe.depends_on_values():
        return False
    length = example_of(value(padding).shape[1])
    rows, patterns = probe.rows(length), padding_patterns(length)
    for start in range(0, len(patterns), rows):
        real = torch.stack((patterns[start : start + rows] + patterns * rows)[:rows])
        seen = probe.evaluate(real)
        seen = seen if seen.dtype == torch.bool else seen > MASKED
        if seen.dim() != 4 or seen.shape[-1] != length:
            return False
        if (seen.expand(rows, *seen.shape[1:]) & ~real[:, None, None, :]).any():
            return False
    return True
