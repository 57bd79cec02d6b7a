"""One group of linears: their weights, rounded on the group's Hessian, some rows at a time.

Rows do not see each other, so that cutting them changes no code; it bounds the working memory and keeps what a column
touches in the processor's caches. Linears that read one input are rounded together as far as they fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch

from ..config import RSQConfig
from .gptq import Quantized, gptq, round_to_nearest
from .grid import Grid, NVFP4Grid
from .hessian import Factor
from .ranks import ALONE, Ranks

SAMPLE = 64  # rows of a weight that its errors are estimated from
_ELEMENTS = 1 << 21  # of a weight, rounded at a time


def rows_at_once(width: int) -> int:
    """How many rows of a weight [N, width] are rounded at a time."""
    return max(128, _ELEMENTS // width)


@dataclass
class Rounded:
    """One linear's part. codes: uint8 [N, K]. parameters: the grid's, [N, groups] each. grid: as bound to it.
    before, after: fp32 [up to 64, K], some of its rows as they were and as their codes have them."""

    codes: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    grid: Grid
    before: torch.Tensor
    after: torch.Tensor


@dataclass
class _Parts:
    codes: list[torch.Tensor] = field(default_factory=list)
    parameters: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)
    after: list[torch.Tensor] = field(default_factory=list)


def round_group(
    weights: Sequence[torch.Tensor],
    factored: Factor,
    grid: Grid,
    config: RSQConfig,
    correction: torch.Tensor | None = None,
    ranks: Ranks = ALONE,
) -> list[Rounded]:
    """Weights [N, K] that read one input, each rounded onto the grid. NVFP4's tensor scale is each weight's own.

    correction: [K, K]; what is rounded is W + W @ correction, see `Drift`. ranks: round a part of the rows each, and all
    of them have the whole then.
    """
    if isinstance(grid, NVFP4Grid):
        return [
            r
            for w in weights
            for r in _stacked([w], factored, grid.bind(_live(w, factored)), config, correction, ranks)
        ]
    return _stacked(weights, factored, grid, config, correction, ranks)


def _live(weight: torch.Tensor, factored: Factor) -> torch.Tensor:
    """The columns that a token reached."""
    return weight[:, ~factored.dead] if bool(factored.dead.any()) else weight


def _stacked(
    weights: Sequence[torch.Tensor],
    factored: Factor,
    grid: Grid,
    config: RSQConfig,
    correction: torch.Tensor | None,
    ranks: Ranks,
) -> list[Rounded]:
    parts = [_Parts() for _ in weights]
    bound = grid
    mine = [tuple(len(w) * r // ranks.size for r in (ranks.rank, ranks.rank + 1)) for w in weights]
    for run in _runs(mine, rows_at_once(weights[0].shape[1])):
        rows = torch.cat([weights[i][first:last].float() for i, first, last in run])
        wanted = rows if correction is None else rows + rows @ correction
        found = round_to_nearest(wanted, grid) if config.method == "nearest" else gptq(wanted, factored, grid)
        bound, at = found.grid, 0
        for i, first, last in run:
            _take(parts[i], found, rows, slice(at, at + last - first), _sampled(len(weights[i]), first, last))
            at += last - first
    parts = [_joined(of_weight) for of_weight in zip(*ranks.gather(parts))]
    return [
        Rounded(
            torch.cat(p.codes),
            tuple(map(torch.cat, zip(*p.parameters))),
            bound,
            torch.cat(p.before),
            torch.cat(p.after),
        )
        for p in parts
    ]


def _joined(parts: Sequence[_Parts]) -> _Parts:
    """One weight's parts, of every rank in turn."""
    return _Parts(*([x for p in parts for x in getattr(p, f.name)] for f in fields(_Parts)))


def _take(part: _Parts, found: Quantized, rows: torch.Tensor, mine: slice, sample: torch.Tensor) -> None:
    part.codes.append(found.codes[mine])
    part.parameters.append(tuple(p[mine] for p in found.parameters))
    part.before.append(rows[mine][sample])
    part.after.append(found.values[mine][sample])


def _sampled(rows: int, first: int, last: int) -> torch.Tensor:
    """Which of the rows first .. last are among the weight's sample, counted from first."""
    step = -(-rows // SAMPLE)
    return torch.arange(-(-first // step) * step, last, step) - first


def _runs(rows: Sequence[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Runs of (weight, first row, last row) of up to `most` rows together, in order. rows: first and last of each weight."""
    run: list[tuple[int, int, int]] = []
    room = most
    for index, (first, count) in enumerate(rows):
        while first < count:
            taken = min(room, count - first)
            run.append((index, first, first + taken))
            first, room = first + taken, room - taken
            if not room:
                yield run
                run, room = [], most
    if run:
        yield run
