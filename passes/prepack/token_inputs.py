"""Which inputs of a program are its tokens and its padding mask."""

from __future__ import annotations

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from .cut import NotPackable

aten = torch.ops.aten
_SAME_IDS = {
    aten.to.dtype,
    aten.clone.default,
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
}


def padding_mask(program: Program, name: str) -> fx.Node:
    """The input that marks real tokens, [batch, sequence]. Raises NotPackable."""
    for place, given in zip(program.placeholders, program.input_names):
        if given == name and isinstance(value(place), torch.Tensor):
            if value(place).dim() != 2:
                raise NotPackable(
                    f"{name} has {value(place).dim()} dimensions; only a [batch, sequence] mask says which tokens are pads."
                )
            return place
    if program.part is not None:
        raise NotPackable(
            f"This graph is a part of the model and has no {name}: {program.part.where}. Padding is followed within one "
            "graph only, from the ids to the results."
        )
    raise NotPackable(
        f"The model was called without {name}, so every token counts as real and there is no padding to leave out."
    )


def token_input(program: Program, padding: fx.Node) -> fx.Node:
    """The input that carries the tokens: ids that an embedding reads, or embeddings themselves. Raises NotPackable."""
    rows = [example_of(s) for s in value(padding).shape]
    candidates = []
    for place in program.placeholders:
        known = value(place)
        if place is padding or not isinstance(known, torch.Tensor) or known.dim() not in (2, 3):
            continue
        if [example_of(s) for s in known.shape[:2]] != rows:
            continue
        if (known.dim() == 3 and known.is_floating_point()) or any(_largest_table(u) for u in place.users):
            candidates.append((max([0, *(_largest_table(u) for u in place.users)]), known.dim(), place))
    if not candidates:
        if turned := _turned(program, padding):
            raise NotPackable(
                f"{turned.name} is turned to [sequence, batch] before it is looked up, and tokens are followed as [batch, "
                "sequence]: it would need rules for values that begin with the sequence."
            )
        behind = "" if program.part is None else f" This graph is a part of the model: {program.part.where}."
        raise NotPackable(
            "No input of shape [batch, sequence] feeds an embedding, so it is unknown which values are tokens."
            + behind
        )
    return max(candidates, key=lambda c: c[:2])[2]


def _turned(program: Program, padding: fx.Node) -> fx.Node | None:
    """An input of ids that an embedding reads with rows and columns exchanged."""
    for place in program.placeholders:
        stack = [] if place is padding else [place]
        while stack:
            for user in stack.pop().users:
                if user.target is aten.embedding.default and user.args[1] is not place:
                    return place
                if user.target in (
                    aten.transpose.int,
                    aten.permute.default,
                    aten.contiguous.default,
                    aten.t.default,
                ):
                    stack.append(user)
    return None


def embedded(tokens: fx.Node) -> list[fx.Node]:
    """The lookups of the token input in its largest table, through casts and what puts other ids in the place of some."""
    found, reads = [], [tokens]
    for node in reads:
        reads += [u for u in node.users if u.target in _SAME_IDS]
        found += [u for u in node.users if u.target is aten.embedding.default and u.args[1] is node]
    largest = max([value(n.args[0]).shape[0] for n in found], default=0)
    return [n for n in found if value(n.args[0]).shape[0] == largest]


def _largest_table(user: fx.Node) -> int:
    if user.target is aten.embedding.default:
        return value(user.args[0]).shape[0]
    if user.target in _SAME_IDS:
        return max([0, *(_largest_table(u) for u in user.users)])
    return 0
