"""Scores of image tokens at a layer boundary, one function a policy.

    transprune   transition variation and instruction-guided attention together (arXiv 2507.20630)
    ttv, iga     one of the two alone
    fastv        attention the last token paid in the layer before the cut (arXiv 2403.06764)
    pyramiddrop  attention the last token pays in the layer after the cut (arXiv 2410.17247)
    random       the control that a method must beat; uniform: every k-th image token
    given        the caller's scores (`thresher.token_types(types, scores)`)

Instruction rows' queries and all keys are computed from the next layer's own projections on the uncut
hidden state. Scores are fp32 [B, n] of the current tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..structure.recover import LayerSite, Tower
from ..tokens.axes import BATCH, SEQUENCE
from ..tokens.frame import pick
from ..tokens.replay import Replay
from ..tokens.segments import Segments
from .rows import ranks_in_runs

_HEADS = (BATCH, None, SEQUENCE, None)


@dataclass
class State:
    """What scoring knows of the current tokens.

    image, pad: bool [B, n]; pad None when no token is padding.
    position: int64 [B, n] in the whole row, or in the packed sequence.
    given: the caller's scores. moved: transition variation summed over layers so far; None before the first.
    scored: layers it covers. run: int64 [B, n], the image of each token, where images have budgets of their own.
    offsets: int32, where each packed sequence begins and ends; None without packing.
    asking: bool [B, n], a question's tokens, or None where nobody says.
    """

    image: torch.Tensor
    pad: torch.Tensor | None
    position: torch.Tensor
    given: torch.Tensor | None = None
    moved: torch.Tensor | None = None
    scored: set[int] = field(default_factory=set)
    offsets: torch.Tensor | None = None
    run: Any = None
    asking: torch.Tensor | None = None

    def narrow(self, index: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Keep tokens `index` [B, L] only. real: bool [B, L], false for places that only fill a row up, or None."""
        for name in ("image", "pad", "position", "given", "moved", "run", "asking"):
            t = getattr(self, name)
            if t is not None:
                setattr(self, name, t.gather(1, index))
        if real is not None:
            self.image = self.image & real
            self.pad = ~real if self.pad is None else self.pad | ~real

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """starts, lengths int64 [B, 1] of the real tokens in each row."""
        batch, tokens = self.position.shape
        if self.offsets is not None:
            return self.offsets[:-1].long()[None], self.offsets.diff().long()[None]
        if self.pad is None:
            starts = self.position.new_zeros((batch, 1))
            return starts, torch.full_like(starts, 1) * tokens
        real = (~self.pad).to(torch.int32)
        return real.argmax(1, keepdim=True), real.sum(1, keepdim=True)

    def ends(self) -> torch.Tensor:
        """int64 [B, sequences in a row]: the place behind the last real token of each."""
        starts, lengths = self.rows()
        return starts + lengths

    def segments(self) -> torch.Tensor | None:
        """int32 [B, n] for `probe_scores`: the packed sequence, or 0; -1 for padding. None where all is one."""
        if self.offsets is not None:
            return Segments(self.offsets).owners(self.position.shape[1])
        return None if self.pad is None else -self.pad.to(torch.int32)

    def ranks(self, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many tokens marked in `among`, bool [B, n], stand before each token of its sequence, itself included,
        less one; and how many there are in all. int64 [B, n], the second [B, 1] without packing."""
        rank, total = among.long().cumsum(1) - 1, among.sum(1, keepdim=True)
        if self.offsets is None:
            return rank, total
        totals = Segments(self.offsets).total(among)
        own = self.segments().long()[0]  # type: ignore[union-attr]
        return rank - (totals.cumsum(0) - totals)[own], totals[own][None]


@dataclass
class Scorer:
    """Scores for one tower. config: of the pass; layers: all of the tower's."""

    config: Any
    layers: Sequence[LayerSite]
    first: int

    def score(self, after: int, replay: Replay, state: State) -> torch.Tensor:
        """The policy's score behind layer `after` (counted from one)."""
        return POLICIES[self.config.policy](self, after, replay, state)

    def transition(self, after: int, replay: Replay, state: State) -> torch.Tensor:
        """Transition variation, summed over the layers from `first` to this one."""
        for number in range(self.first, after + 1):
            if number in state.scored:
                continue
            state.scored.add(number)
            for branch in self.layers[number - 1].branches:
                paper = self.config.mode == "paper"
                x = replay.now(branch.stream if paper else branch.site.linears[0].x)
                change = replay.now(branch.post_norm.output if branch.post_norm else branch.site.output)
                size, cosine = torch.ops.thresher.token_transition(x, change)
                one = torch.ops.thresher.transition_score(size, cosine, state.image, self.config.mode)
                if state.offsets is not None:  # the softmax ran over all sequences; share it out
                    ones = torch.ones_like(size)
                    turn = torch.ops.thresher.transition_score(ones, cosine, state.image, self.config.mode)
                    segment = state.segments().long()  # type: ignore[union-attr]
                    total = turn.new_zeros((1, state.offsets.shape[0])).scatter_add(1, segment, turn)
                    one = one / total.gather(1, segment).clamp_min(1e-12)
                state.moved = one if state.moved is None else state.moved + one
        assert state.moved is not None
        return state.moved

    def instruction(self, after: int, replay: Replay, state: State, count: int) -> torch.Tensor:
        """Mean attention from the last `count` tokens behind the image, by the next layer's projections."""
        layer = self.layers[after]
        site = layer.attention
        assert site is not None
        types = state.image.to(torch.int32)  # TensorRT takes int8 for quantized numbers
        rows = torch.ops.thresher.instruction_positions(types, *state.rows(), count)
        if state.asking is not None and self.config.policy in ("transprune", "iga"):
            rows = _asking(state, rows)
        q = replay.ahead(site.q.result, layer.input, rows.clamp_min(0))
        k = replay.ahead(site.k.result, layer.input, None)
        sums, _ = torch.ops.thresher.probe_scores(q, k, rows, state.segments(), site.operator_scale)
        asked = (rows >= 0).unflatten(1, (-1, count)).sum(2)  # of each sequence
        segment = state.segments() if state.offsets is not None else None
        asked = asked if segment is None else asked.gather(1, segment.long().clamp_max(asked.shape[1] - 1))
        return sums / asked.clamp_min(1)

    def reserved(self, after: int, replay: Replay, state: State, count: torch.Tensor) -> torch.Tensor:
        """bool [B, n]: as many image tokens of each row as `count` says, int64 [B, 1] or, of packed sequences, [1, n], which
        are kept whatever the question; see `reserve_by`."""
        by = self.config.reserve_by
        if by == "even":
            return spread(count, state.image, state)
        layer = self.layers[after]
        site = layer.attention
        assert site is not None
        keys = replay.ahead(site.k.result, layer.input, None)
        if by == "keys":
            score = keys.float().norm(dim=-1).mean(1)
        else:
            rows = _looking(state, self.config.instruction)
            queries = replay.ahead(site.q.result, layer.input, rows.clamp_min(0))
            sums, seen = torch.ops.thresher.probe_scores(
                queries, keys, rows, state.segments(), site.operator_scale
            )
            score = sums / seen.clamp_min(1)
        segments = state.segments() if state.offsets is not None else None
        owner = torch.zeros_like(state.position) if segments is None else segments.long().clamp_min(0)
        return state.image & (ranks_in_runs(score, state.image, owner) < count)

    def last_paid(self, after: int, replay: Replay, state: State) -> torch.Tensor:
        """Attention from the last token in the layer before the cut."""
        site = self.layers[after - 1].attention
        assert site is not None
        starts, lengths = state.rows()
        last = torch.where(lengths > 0, starts + lengths - 1, -1)
        q = pick(replay.env[site.q.result], _HEADS, last.clamp_min(0))
        return torch.ops.thresher.probe_scores(
            q, replay.env[site.k.result], last, state.segments(), site.operator_scale
        )[0]


def _looking(state: State, count: int) -> torch.Tensor:
    """`count` image tokens of each sequence, evenly spaced, int64 [B, P], rising; -1 in front where there are fewer."""
    each = torch.full_like(state.position[:, :1], count)
    if state.offsets is not None:
        each = each.expand(state.position.shape)
    rows = count if state.offsets is None else count * (state.offsets.shape[0] - 1)
    place = torch.arange(state.position.shape[1], device=state.position.device)
    found = torch.where(spread(each, state.image, state), place, -1).sort(1).values
    short = rows - found.shape[1]
    return found[:, -rows:] if short <= 0 else found


def _asking(state: State, rows: torch.Tensor) -> torch.Tensor:
    """Rows that ask, int64 [B, P]: the last of a question's tokens behind the image, or `rows` where there is none."""
    assert state.asking is not None
    place = torch.arange(state.image.shape[1], device=rows.device)
    last = torch.where(state.image, place, -1).amax(1, keepdim=True)
    asks = state.asking & (place > last)
    if state.pad is not None:
        asks = asks & ~state.pad
    found = torch.where(asks, place, -1).sort(1).values
    short = rows.shape[1] - found.shape[1]
    found = torch.nn.functional.pad(found, (short, 0), value=-1) if short > 0 else found[:, -rows.shape[1] :]
    return torch.where(asks.any(1, keepdim=True), found, rows)


def spread(count: torch.Tensor, among: torch.Tensor, state: State) -> torch.Tensor:
    """bool [B, n]: `count` of the tokens marked in `among`, evenly spaced; int64 [B, 1], or [1, n] for each sequence."""
    rank, total = state.ranks(among)
    total = total.clamp_min(1)
    return among & ((rank + 1) * count // total > rank * count // total)


def _transprune(s: Scorer, after: int, replay: Replay, state: State) -> torch.Tensor:
    moved = s.transition(after, replay, state)
    attention = s.instruction(after, replay, state, s.config.instruction)
    return torch.ops.thresher.transprune_score(moved, attention, state.image, s.config.mode)


def _random(s: Scorer, after: int, replay: Replay, state: State) -> torch.Tensor:
    """The same for a position whatever the batch: a hash of position and seed."""
    x = state.position * 2654435761 + s.config.seed * 40503 + 12345
    for _ in range(2):  # a few rounds of xor and multiply, in 31 bits
        x = ((x ^ (x >> 15)) * 739982445) & 0x7FFFFFFF
    return (x ^ (x >> 12)).float()


def _uniform(s: Scorer, after: int, replay: Replay, state: State) -> torch.Tensor:
    """Tokens fall in the order in which halving a stretch reaches them, so any number kept is evenly spread."""
    rank, total = state.ranks(state.image)
    place = (rank * 65536 // total.clamp_min(1)).clamp_min(0)
    score = torch.zeros_like(place)
    for bit in range(16):  # bits of the place in reverse
        score = score * 2 + (place >> bit & 1)
    return -score.float()


def _given(s: Scorer, after: int, replay: Replay, state: State) -> torch.Tensor:
    assert state.given is not None
    return state.given


Policy = Callable[[Scorer, int, Replay, State], torch.Tensor]
POLICIES: dict[str, Policy] = {
    "transprune": _transprune,
    "ttv": lambda s, after, replay, state: s.transition(after, replay, state),
    "iga": lambda s, after, replay, state: s.instruction(after, replay, state, s.config.instruction),
    "fastv": lambda s, after, replay, state: s.last_paid(after, replay, state),
    "pyramiddrop": lambda s, after, replay, state: s.instruction(after, replay, state, 1),
    "random": _random,
    "uniform": _uniform,
    "given": _given,
}
ASK_ATTENTION = frozenset({"transprune", "iga", "fastv", "pyramiddrop"})


def past_windows(tower: Tower, policy: str, after: int) -> str:
    """What to say where attention that the scoring layer's window would hide is scored all the same; else ""."""
    if policy not in ASK_ATTENTION:
        return ""
    layer = tower.layers[after - 1 if policy == "fastv" else after]
    if layer.attention is None or layer.attention.window is None:
        return ""
    return (
        f"{layer.fqn} sees a window of {layer.attention.window + 1} tokens, which may not reach the image from behind"
        " it; its attention is scored as if it saw everything. Compare with policy='ttv' or 'uniform'."
    )
