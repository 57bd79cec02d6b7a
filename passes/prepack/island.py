"""Parts that mix positions and run on padded rows inside the packed program: convolutions, scans, unknown attentions.

    matched:  hidden [B, S, ...] -> operators that mix positions -> a result [B, S, width] that a linear reads
    becomes:  zeros [B, S, ...] with the real tokens put in their places, the same operators, the real tokens taken out

What stands around such an island, most of a model's weights, runs packed. An island is right where a real token's result
neither reads another row nor what stands at pads. That is not read from the operators but shown: the island is run on
random values under padding of every kind, with other values at the pads, and with another row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import module_fqn, value

from ..tokens.axes import BATCH, SEQUENCE, TOKENS


@dataclass(eq=False)
class Island:
    """end: the result, [B, S, ...]. nodes: all that is computed on padded rows, in graph order, `end` last. entering:
    values of the tokens that it reads. around: tensors [of the padded batch] that it reads and no token decides. why: what
    stopped the tokens. holes: whether pads between real tokens change nothing; a scan goes on over them."""

    end: fx.Node
    nodes: list[fx.Node]
    entering: list[fx.Node]
    around: list[fx.Node]
    why: str
    holes: bool = False

    @property
    def where(self) -> str:
        return module_fqn(self.nodes[0]) or self.nodes[0].name


def laid_out(labels: tuple[str | None, ...]) -> bool:
    """Whether labels say where a value's rows and positions are, or its tokens."""
    named = [label for label in labels if label is not None]
    return sorted(named) == sorted([BATCH, SEQUENCE]) or named == [TOKENS]


def as_rows(
    tensor: torch.Tensor, labels: tuple[str | None, ...], rows: Any, columns: Any, size: Any
) -> torch.Tensor:
    """A packed value of the body as the padded batch has it, zeros at pads.

    rows, columns: int64 [T], of each token; row -1 marks filler. size: (rows, columns) of the padded batch.
    """
    batch, sequence = size
    packed = TOKENS in labels
    at = [labels.index(name) for name in ((TOKENS,) if packed else (BATCH, SEQUENCE))]
    flat = tensor.movedim(at, list(range(len(at))))
    flat = flat if packed else flat.squeeze(0)
    ground = flat.new_zeros([batch + 1, sequence, *flat.shape[1:]])  # filler goes to a row of its own
    padded = torch.ops.aten.index_put.default(ground, [rows, columns], flat)[:batch]
    padded = padded.flatten(0, 1) if packed else padded
    return padded.movedim(list(range(len(at))), at)


def as_tokens(padded: torch.Tensor, rows: Any, columns: Any) -> torch.Tensor:
    """The tokens of a padded result [B, S, ...] as one row [1, T, ...]."""
    return torch.ops.aten.index.Tensor(padded, [rows.clamp_min(0), columns]).unsqueeze(0)


def run_island(island: Island, env: Mapping[fx.Node, Any], size_of: Any) -> Any:
    """The island's result from the values of what it reads. size_of: gives a symbolic size for the rows at hand."""
    made = dict(env)

    def of(argument: Any) -> Any:
        known = value(argument)
        if argument not in made and isinstance(known, (torch.SymInt, int)):
            return size_of(known)
        return made[argument]

    for node in island.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), of)
        made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return made[island.end]
