"""What the token passes share on packed programs: sequences of one row, each with a budget of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.packed_layout import PackedLayout
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from .replay import packed_attention
from .types import NotPrunable, Types, find_types


def caller(program: Program) -> Program:
    """The program that takes the caller's inputs as they are."""
    return program if program.packing is None else program.packing.padded


def offsets_node(program: Program) -> fx.Node:
    """Where a packed program's sequences begin and end: int32 [S + 1]. Raises NotPrunable without segments."""
    sites = program.nodes(packed_attention())
    if not sites:
        raise NotPrunable("The program is packed, and its attention takes masks.")
    return sites[0].all_input_nodes[3]


def caller_types(program: Program, config: Any, inputs: Any = None) -> Types:
    """Where token types come from in the caller's inputs of a packed program."""
    layout: PackedLayout = program.packing
    tokens = layout.padded.placeholders[layout.tokens]
    return find_types(layout.padded, config, [example_of(s) for s in value(tokens).shape[:2]], inputs)


class Segments:
    """Packed sequences of one row of tokens.

    offsets: int32 [S + 1], where they begin and end. count: how many of them are real; a last one that holds
    places filled up by an earlier choice is not (None: all).
    """

    def __init__(self, offsets: torch.Tensor, count: Any = None):
        self.offsets, self.ends = offsets, offsets if count is None else offsets[: count + 1]

    @property
    def count(self) -> Any:
        return self.ends.shape[0] - 1

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [S]: tokens of each real sequence."""
        return self.ends.diff().long()

    def owners(self, tokens: Any) -> torch.Tensor:
        """int32 [1, tokens]: the sequence of each token."""
        place = torch.arange(tokens, device=self.offsets.device)
        return torch.bucketize(place, self.offsets[1:], right=True, out_int32=True)[None]

    def total(self, flags: torch.Tensor) -> torch.Tensor:
        """int64 [S]: how many tokens of each sequence are marked in `flags`, bool [1, tokens]."""
        running = flags[0].long().cumsum(0)
        return torch.cat([running.new_zeros(1), running])[self.ends.long()].diff()

    def choose(
        self, score: torch.Tensor, protected: torch.Tensor | None, counts: torch.Tensor, places: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best tokens of each sequence, in `places` places.

        score, protected: [1, tokens]. counts: int64 [S].
        Returns index int64 [1, places], rising within each sequence; their offsets int32 [S + 2], places left over
        being a sequence of their own; and bool [places], false for those.
        """
        spare = counts.new_zeros((self.offsets.shape[0] - 1 - counts.shape[0],))
        index, ends = torch.ops.thresher.topk_segments(
            score[0],
            None if protected is None else protected[0],
            self.offsets,
            torch.cat([counts, spare]),
            places,
        )
        last = torch.full_like(ends[:1], 1) * places
        ends = ends[: counts.shape[0] + 1]
        real = torch.arange(index.shape[0], device=index.device) < ends[-1]
        return index[None], torch.cat([ends, last.to(ends.dtype)]), real
