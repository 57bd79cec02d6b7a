"""Builds the pruned program: runs the layers again and cuts tokens at the stages' boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thresher import given_tokens
from thresher.graph.nodes import value
from thresher.graph.program import Program

from ..tokens.axes import SEQUENCE
from ..tokens.frame import Frame
from ..tokens.replay import Replay
from ..tokens.retrace import retrace
from ..tokens.segments import Segments
from ..tokens.types import Types
from .rows import choose, ranks_in_runs, runs
from .scores import Scorer, State

_EXTRA = {"token_types": torch.int8, "token_scores": torch.float32, given_tokens.ASKING: torch.bool}


def prune(
    program: Program, found: Any, config: Any, extra: Sequence[str]
) -> tuple[list[str], dict[int, tuple[int, str, bool]]]:
    """Rewrite a program in place.

    found: what the pass matched (tower, types, axes, stages, drops). extra: inputs to append, by name.
    Returns the names of the results appended, int64 [B, L] kept tokens of each stage, and for each of the
    caller's results that is shorter: its sequence dimension, the name of its kept tokens, and whether it
    was given its places back.
    """
    builder = _Builder(program, found, config)
    like = value(found.tower.layers[0].input)
    with program.fake_mode():
        fakes = {n: torch.empty(like.shape[:2], dtype=_EXTRA[n], device=like.device) for n in extra}
    retrace(program, builder.replay, fakes)
    return builder.names, builder.shortened


class _Builder:
    def __init__(self, program: Program, found: Any, config: Any):
        self.program, self.found, self.config = program, found, config
        self.layers = found.tower.layers
        self.cuts = {self.layers[after].input: (i, after) for i, (after, _) in enumerate(found.stages)}
        self.names = [f"kept.{after}" for after, _ in found.stages]
        self.shortened: dict[int, tuple[int, str, bool]] = {}
        self.results = program.outputs
        self.state: State | None = None
        self.full: torch.Tensor | None = None
        self.frames: list[Frame] = []
        self.packed = program.packing is not None
        if self.packed:
            self.names = []

    def replay(self, env: dict[Any, Any], extra: Mapping[str, Any]) -> list[Any]:
        axes, types = self.found.axes, self.found.types
        self.shortened, self.state, self.full, self.frames = {}, None, None, []
        self.kept: list[Any] = []
        self.real: torch.Tensor | None = None
        replay = Replay(axes, {**env, **extra}, None, self.found.tables)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                if node in axes.stopped:
                    self._restore_arguments(node, replay)
                replay.compute(node)
            if (
                node is self.layers[-1].output and self.full is not None
            ):  # all tokens go through norm and head
                replay.env[node] = self._restored(node, replay)
                replay.home[node], replay.frame = replay.root, replay.root
            if node in self.cuts:
                self._cut(node, *self.cuts[node], replay, types)
        return [*(self._result(i, n, replay) for i, n in enumerate(self.results)), *self.kept]

    def _kept(self, frame: Frame, replay: Replay) -> Any:
        """A stage's tokens in the whole prompt, int64 [B, L]; -1 for places that only fill a row up."""
        index = frame.since(replay.root)
        return index if frame.real is None else index.masked_fill(~frame.real, -1)  # type: ignore[union-attr]

    def _cut(self, node: fx.Node, stage: int, after: int, replay: Replay, types: Types) -> None:
        hidden = replay.env[node]
        batch, length = hidden.shape[:2]
        replay.home.setdefault(node, replay.root)
        if self.state is None:
            replay.root.length = length
            image, pad = types.flags(replay.env, hidden)
            position = torch.arange(length, device=hidden.device)[None].expand(batch, length)
            offsets = replay.env[self.found.offsets] if self.packed else None
            if offsets is not None:
                self.first = Segments(offsets)
                position = position - offsets.long()[self.first.owners(length).long()]
                self.images = self.first.total(image)
            first = self.config.accumulate_from or after
            self.scorer = Scorer(self.config, self.layers, first)
            self.state = State(image, pad, position, replay.env.get("token_scores"), offsets=offsets)
            self.state.asking = replay.env.get(given_tokens.ASKING)
            self.ends = self.state.ends()
            if offsets is None:
                self.images, self.lengths = image.sum(1), self.state.rows()[1][:, 0]
                # else all rows lose as many, and no place is left over
                self.uneven = (
                    pad is not None or self.config.per_image or not (isinstance(batch, int) and batch == 1)
                )
            if self.config.per_image:
                self.state.run = runs(image)
                self.runs = torch.zeros_like(self.state.run).scatter_add(1, self.state.run, image.long())
        state = self.state
        drops = self.found.drops
        going = drops[stage] - (drops[stage - 1] if stage else 0)
        score = self.scorer.score(after, replay, state)
        protected = ~state.image
        if state.pad is not None:
            protected = protected & ~state.pad
        gone = self._gone(stage)
        if self.config.per_image:
            protected = protected | self._best_of_images(stage, score, state)
        elif self.config.reserve:
            evenly = (self._image_kept(gone, state) * round(self.config.reserve * 1024)) // 1024
            protected = protected | self.scorer.reserved(after, replay, state, evenly)
        real: torch.Tensor | None = None
        if state.offsets is None:
            counts = self.lengths - gone if self.uneven else None
            index, real = choose(score, protected, state.pad, counts, length - going)
        else:
            index = self._choose_packed(stage, score, protected, length - going, state)
        if self.config.restore == "passthrough":
            at = replay.frame.since(replay.root)
            whole = self.full is None or at is None
            self.full = hidden if whole else self._restored(node, replay, self.full)
        frame = replay.narrow(index, length - going)
        frame.offsets, frame.real = state.offsets, self.real if self.packed else real
        self.frames.append(frame)
        if not self.packed:
            self.kept.append(self._kept(frame, replay))
        state.narrow(index, real)
        if self.found.tables:
            frame.numbered = self._numbered(state, replay.root.length)

    def _numbered(self, state: State, length: Any) -> torch.Tensor:
        """The tokens of the whole sequence whose positions the kept ones take, int64 [B, L]: the last ones.

        The published code counts 0, 1, ...; rotary embedding sees differences only, so this is the same
        attention, and the next token's position is the prompt's length whatever was left out.
        """
        shift = self.ends - state.ends()[:, : self.ends.shape[1]]
        if state.offsets is not None:  # one for each packed sequence; places left over may have any
            shift = shift.gather(1, state.segments().long().clamp_max(shift.shape[1] - 1))  # type: ignore[union-attr]
        place = torch.arange(state.position.shape[1], device=shift.device)
        return (place + shift).clamp_min(0).clamp_max(length - 1)

    def _image_kept(self, gone: torch.Tensor, state: State) -> torch.Tensor:
        """Image tokens left in each row, int64 [B, 1]; of packed sequences, [1, n] at each of their tokens."""
        kept = self.images - gone
        if state.offsets is not None:
            return kept[state.segments().long().clamp_max(kept.shape[0] - 1)]  # type: ignore[union-attr]
        return kept[:, None].clamp_min(0)

    def _gone(self, stage: int) -> torch.Tensor:
        """int64 [S] or [B]: image tokens that each sequence loses by this stage and those before; see `rows.going`."""
        keep = self.found.stages[stage][1]
        images = self.runs if self.config.per_image else self.images
        gone = torch.floor((1 - keep) * images.double() + 1e-6).long()
        gone = torch.minimum(gone, (images - 1).clamp_min(0))
        if self.config.per_image:
            gone = gone.sum(1)
        elif not self.packed:
            gone = gone // self.config.bucket * self.config.bucket
        return torch.where(self.images < self.config.min_image_tokens, 0, gone)

    def _best_of_images(self, stage: int, score: torch.Tensor, state: State) -> torch.Tensor:
        """bool [B, n]: the tokens that each image keeps, its share of those it had."""
        keep = self.found.stages[stage][1]
        quota = self.runs - torch.floor((1 - keep) * self.runs.double() + 1e-6).long()
        few = (self.images < self.config.min_image_tokens)[:, None]
        quota = torch.where(few, self.runs, quota.clamp_min(1))
        return state.image & (ranks_in_runs(score, state.image, state.run) < quota.gather(1, state.run))

    def _choose_packed(
        self, stage: int, score: Any, protected: Any, places: Any, state: State
    ) -> torch.Tensor:
        """The best tokens of each sequence; places left over are a sequence of their own."""
        assert state.offsets is not None
        segments = Segments(state.offsets, self.first.count)
        counts = self.first.lengths - self._gone(stage)
        index, state.offsets, self.real = segments.choose(score, protected, counts, places)
        return index

    def _restored(self, node: fx.Node, replay: Replay, base: torch.Tensor | None = None) -> Any:
        """A labelled value with all tokens' places; `base` at those left out, else zeros, or what they left with."""
        if base is None and node is self.layers[-1].output and self.config.restore == "passthrough":
            base = self.full
        return replay.restored(node, base)

    def _restore_arguments(self, node: fx.Node, replay: Replay) -> None:
        """What mixes positions gets all tokens' places."""
        for argument in node.all_input_nodes:
            if argument in replay.axes and replay.home.get(argument, replay.root).step is not None:
                replay.env[argument] = self._restored(argument, replay)
                replay.home[argument] = replay.root

    def _result(self, index: int, node: fx.Node | None, replay: Replay) -> Any:
        if not isinstance(node, fx.Node):
            return node
        home = replay.home.get(node, replay.root)
        labels = replay.axes.get(node)
        if home.step is None or not isinstance(labels, tuple) or SEQUENCE not in labels:
            return replay.env[node]
        dim = labels.index(SEQUENCE)
        restored = value(node).dim() == 3 and self.config.restore != "none"
        if self.packed:
            return self._restored(node, replay)
        self.shortened[index] = (dim, self.names[self.frames.index(home)], restored)
        return self._restored(node, replay) if restored else replay.env[node]
