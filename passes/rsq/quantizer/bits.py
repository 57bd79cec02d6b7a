"""Mixed precision: how many bits each layer gets, from what its quantisation does to the model's output."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher.progress import progress

from ...structure.experts import ExpertSite
from ...structure.recover import LinearSite
from ..config import RSQConfig
from ..edits import RotationPlan
from . import codes as rsq_codes
from .gptq import round_to_nearest
from .grid import Grid
from .pieces import Batch, Piece, matrix
from .sweep import Sweep, bind

WIDTHS = (2, 3, 4, 8)
_PROBE_BITS = 3
PROBE_ROWS, PROBE_TOKENS = 2, 128


def sensitivities(
    sweep: Sweep, pieces: Sequence[Piece], batches: Sequence[Batch], config: RSQConfig
) -> dict[str, float]:
    """By piece: how far the output moves when only that piece is rounded to 3 bits.

    KL divergence for logits (an output as wide as no hidden state: above 1024 values), else relative squared
    error; on a few short sequences. The values before each piece are kept, so that a probe runs the rest only.
    """
    program = sweep.program
    output = next(o for o in program.outputs if o is not None)
    inputs = bind(program, batches[0].inputs, (PROBE_ROWS, PROBE_TOKENS))
    whole = sweep.run(sweep.start(inputs), {output})[output]
    grid = rsq_codes.make_grid(config, _PROBE_BITS)
    found: dict[str, float] = {}
    state = sweep.start(inputs)
    for piece in progress(pieces, "measuring sensitivity", len(pieces)):
        xs = [group[0].x for group in piece.groups]
        nodes = sweep.needed([xs[0]], state)
        reached = set(nodes) | set(state)
        after = sweep.needed([output], reached)
        live = {a for n in after for a in n.all_input_nodes if a in reached and a.op != "get_attr"}
        state = {n: v for n, v in sweep.run(state, live | {xs[0]}, nodes).items() if n in live or n is xs[0]}
        sites = [s for group in piece.groups for s in group]
        for site in sites:
            weight = sweep.weight(site.weight)
            rounded = _rounded(site, weight, grid)
            sweep.overrides[site.weight] = functools.partial(_given, rounded)
        sweep.forget()
        found[piece.name] = _distance(whole, sweep.run(state, {output})[output])
        for site in sites:
            del sweep.overrides[site.weight]
        sweep.forget()
    return found


def _rounded(site: Any, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """A linear's weight, or a mixture's as the model stores it, on the grid."""
    if not isinstance(site, ExpertSite):
        return round_to_nearest(weight.float(), grid).values.to(weight.dtype)
    made = torch.empty_like(weight)
    for expert, w in enumerate(weight):
        made[expert] = matrix(site, round_to_nearest(matrix(site, w).float(), grid).values)
    return made


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _distance(expected: torch.Tensor, actual: torch.Tensor) -> float:
    if expected.shape[-1] <= 1024:
        return float(
            (expected - actual).double().square().sum() / expected.double().square().sum().clamp_min(1e-30)
        )
    p, q = (torch.log_softmax(t.float(), -1) for t in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


def allocate(sensitivity: Mapping[str, float], sizes: Mapping[str, int], average: float) -> dict[str, int]:
    """Bits by piece: the least sum of expected damage with a mean width, over all weights, of at most `average`.

    Rounding error falls by 4 with each bit, so a piece at b bits does sensitivity * 4^(3 - b). Greedy: the next
    step goes where it saves most for each bit spent, which is optimal up to one step since the curve is convex.
    """
    bits = dict.fromkeys(sizes, WIDTHS[0])
    left = average * sum(sizes.values()) - WIDTHS[0] * sum(sizes.values())
    open_pieces = set(sizes)
    while open_pieces:
        best, best_gain = None, 0.0
        for name in sorted(open_pieces):
            at = WIDTHS.index(bits[name])
            if at + 1 == len(WIDTHS):
                continue
            step = WIDTHS[at + 1] - WIDTHS[at]
            if step * sizes[name] > left:
                continue
            saved = sensitivity[name] * (4.0 ** (3 - WIDTHS[at]) - 4.0 ** (3 - WIDTHS[at + 1]))
            gain = max(saved, 1e-30) / (step * sizes[name])
            if gain > best_gain:
                best, best_gain = name, gain
        if best is None:
            break
        at = WIDTHS.index(bits[best])
        left -= (WIDTHS[at + 1] - WIDTHS[at]) * sizes[best]
        bits[best] = WIDTHS[at + 1]
    return bits


def widths(
    pieces: Sequence[Piece],
    plan: RotationPlan,
    head: LinearSite | None,
    config: RSQConfig,
    sensitivity: Mapping[str, float] | None,
) -> dict[str, int]:
    """Bits by piece: `bits`, or by what each does to the output where that is given; the head's own where it has some."""
    alone = {p.name for p in pieces if config.head_bits and [[head]] == p.groups}
    apart = dict.fromkeys(alone, config.head_bits)
    if config.head_bits and not apart:
        plan.notes.append("head_bits: no linear stands alone as the head, so it changes nothing.")
    if sensitivity is None:
        return {p.name: config.bits for p in pieces} | apart
    sizes = dict.fromkeys((p.name for p in pieces if p.name not in apart), 0)
    for piece in pieces:
        for site in (s for group in piece.groups for s in group if piece.name in sizes):
            count = site.count if isinstance(site, ExpertSite) else 1
            sizes[piece.name] += count * site.in_features * site.out_features
    return allocate(sensitivity, sizes, config.average_bits) | apart
