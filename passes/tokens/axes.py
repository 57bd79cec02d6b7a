"""Which dimensions of each value run over the batch and over the sequence.

Starting from the token inputs, labels follow the data through the graph, one rule per operator. A
labelled operator treats every token alike, so the same node computes the same thing for tokens laid
out in any other way; one that mixes positions stops the flow, and so does everything after it. The
labels come from the data flow alone: neither equal sizes nor equal symbols mean anything, so a
graph captured at fixed sizes is labelled as well as a dynamic one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import fx

from thresher.graph.program import Program
from thresher.graph.token_labels import BATCH, SEQUENCE, TOKENS, Labels, Stop, TokenAxes, attends

from . import rules  # noqa: F401 (importing the rules registers them)
from .labels import aten, rule_for, sizes
from .regroup import regroup

__all__ = [
    "BATCH",
    "SEQUENCE",
    "TOKENS",
    "Labels",
    "Stop",
    "TokenAxes",
    "propagate",
    "regroup",
    "sizes",
]


class Closes(Protocol):
    """Finds parts that mix positions inside and end in tokens again."""

    def close(self, reader: fx.Node, axes: TokenAxes) -> bool: ...


class Composite(Protocol):
    """An attention spelled out in several nodes."""

    @property
    def q(self) -> fx.Node: ...
    @property
    def k(self) -> fx.Node: ...
    @property
    def v(self) -> fx.Node: ...
    @property
    def mask(self) -> fx.Node | None: ...
    @property
    def inside(self) -> frozenset[fx.Node]: ...


def propagate(
    program: Program,
    seeds: Mapping[fx.Node, Labels],
    composites: Mapping[fx.Node, Composite] | None = None,
    islands: Closes | None = None,
) -> TokenAxes:
    """Follow the labels of `seeds` through the program; each seed has a batch and a sequence dimension.

    composites: attentions spelled out in several nodes, by the node that holds the result; what is inside
    them gets no labels and stops nothing. islands: asked at each node that tokens do not reach whether what it reads is
    the end of a part beyond which they can be followed again.
    """
    composites = composites or {}
    inside = {n for c in composites.values() for n in c.inside}
    seed, labels = next(iter(seeds.items()))
    extent = dict(zip(labels, sizes(seed)))
    axes = TokenAxes(extent[BATCH], extent[SEQUENCE], labels=dict(seeds))
    for node in program.nodes():
        if node in inside:
            continue
        if node in composites and composites[node].inside:
            _composite(node, composites[node], axes)
            continue
        sources = [a for a in node.all_input_nodes if a in axes.labels]
        held_up = next((a for a in node.all_input_nodes if a in axes.stopped), None)
        if held_up is not None and islands is not None and islands.close(node, axes):
            sources = [a for a in node.all_input_nodes if a in axes.labels]
            held_up = next((a for a in node.all_input_nodes if a in axes.stopped), None)
        if held_up is not None:
            axes.stopped[node] = axes.stopped[held_up]
        elif sources and node.target is not aten.sym_size.int:
            try:
                axes.labels[node] = rule_for(node)(node, axes)
            except Stop as stop:
                axes.stopped[node] = f"{node.name} ({node.target}) {stop}"
    return axes


def _composite(node: fx.Node, site: Composite, axes: TokenAxes) -> None:
    held_up = next((a for a in (site.q, site.k, site.v) if a in axes.stopped), None)
    if held_up is not None:
        axes.stopped[node] = axes.stopped[held_up]
    elif any(a in axes for a in (site.q, site.k, site.v)):
        try:
            axes.labels[node] = attends((site.q, site.k, site.v), site.mask, axes)
        except Stop as stop:
            axes.stopped[node] = f"{node.name} (attention) {stop}"
