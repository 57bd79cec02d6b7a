"""Builds the rewritten attention of ZipVL, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.program import Program, value

from .structure import AttentionSite
from .token_axes import BATCH, SEQUENCE
from .tokens_replay import Replay, pick, put, retrace

aten = torch.ops.aten
_HEADS = (BATCH, None, SEQUENCE, None)


@dataclass
class Done:
    """names: of the results appended. shortened: caller's result -> its kept tokens' name. scored: likewise."""

    names: list[str] = field(default_factory=list)
    shortened: dict[int, str] = field(default_factory=dict)
    scored: dict[int, str] = field(default_factory=dict)


def rewrite_layers(program: Program, plan: Any, config: Any, extra: Sequence[str]) -> Done:
    """Rewrite a program's attentions in place, as `zipvl.Plan` says."""
    builder = _Builder(program, plan, config)
    like = value(plan.tower.layers[0].input)
    with program.fake_mode():
        fakes = {n: torch.empty(like.shape[:2], dtype=torch.int8, device=like.device) for n in extra}
    retrace(program, builder.replay, fakes)
    return builder.done


def budget(length: Any, share: float, protected: int, bucket: int) -> Any:
    """How many tokens attend: the protected ones and a share of the others, in whole buckets; at most all.

    length may be symbolic.
    """
    parts = 4096
    beside = length - protected
    kept = protected + (beside * round(share * parts) + parts - 1) // parts
    kept = (kept + bucket - 1) // bucket * bucket
    return min(kept, length) if isinstance(length, int) else torch.sym_min(torch.sym_max(kept, 1), length)


@dataclass
class _Chosen:
    """One layer's choice. index int64 [B, L]; places not used hold -1 where rows are padded."""

    index: torch.Tensor
    scores: torch.Tensor
    held: torch.Tensor


class _Builder:
    def __init__(self, program: Program, plan: Any, config: Any):
        self.program, self.plan, self.config = program, plan, config
        self.results = program.outputs
        self.done = Done()
        self.shares = {layer.attention: share for layer, share in plan.layers}
        projections = config.gather == "projections"
        self.whole = {s.o.output: s for s in self.shares if projections and not s.fused}
        self.inner = {s.node: s for s in self.shares if not (projections and not s.fused)}
        self.chosen: dict[AttentionSite, _Chosen] = {}

    def replay(self, env: dict[Any, Any], extra: Mapping[str, Any]) -> list[Any]:
        self.chosen, self.done = {}, Done()
        replay = Replay(self.plan.axes, {**env, **extra}, None)
        start = self.plan.tower.layers[0].input
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                if node in self.whole:
                    replay.env[node] = self._above_projections(self.whole[node], replay)
                elif node in self.inner:
                    replay.env[node] = self._attention(self.inner[node], replay)
                else:
                    replay.compute(node)
            if node is start:
                self._begin(replay, replay.env[node])
        return [*self._returned(replay), *self._appended()]

    def _begin(self, replay: Replay, hidden: torch.Tensor) -> None:
        """What every layer's choice has in common: padding, protection, probe rows."""
        config = self.config
        batch, length = hidden.shape[:2]
        replay.root.length = length
        self.image, self.pad = self.plan.types.flags(replay.env, hidden)
        place = torch.arange(length, device=hidden.device)[None].expand(batch, length)
        if self.pad is None:
            self.starts = place.new_zeros((batch, 1))
            self.lengths = torch.full_like(self.starts, 1) * length
            self.segments, self.counts = None, None
        else:
            real = (~self.pad).to(torch.int32)
            self.starts, self.lengths = real.argmax(1, keepdim=True), real.sum(1, keepdim=True)
            self.segments, self.counts = -self.pad.to(torch.int32), self.lengths[:, 0]
        self.protected = None
        if config.mode == "protected":
            inside = place - self.starts
            near = (inside >= self.lengths - config.recent) | (inside < config.sinks)
            self.protected = near if self.plan.types.kind == "none" else ~self.image
            if self.pad is not None:
                self.protected = self.protected & ~self.pad
        self.rows = torch.ops.thresher.probe_positions(
            self.starts, self.lengths, config.recent, config.spread, config.seed
        )
        self.length = length

    def _choose(self, site: AttentionSite, q: torch.Tensor, k: torch.Tensor) -> _Chosen:
        """The important tokens of one layer. q: [B, Hq, P, D] of the probe rows; k: [B, Hkv, n, D]."""
        sums, seen = torch.ops.thresher.probe_scores(q, k, self.rows, self.segments, site.scale)
        scores = sums / seen.clamp_min(1)
        count = budget(self.length, self.shares[site], self.plan.protected, self.config.bucket)
        index = torch.ops.thresher.topk_sorted(scores, self.protected, self.pad, count, self.counts)
        at = index if self.counts is None else index.clamp_min(0)
        held = sums.gather(1, at)
        if self.counts is not None:
            held = held.masked_fill(index < 0, 0.0)
        held = held.sum(1) / sums.sum(1).clamp_min(1e-12)
        self.chosen[site] = _Chosen(index, scores, held)
        return self.chosen[site]

    def _attention(self, site: AttentionSite, replay: Replay) -> torch.Tensor:
        q, k, v = (replay.env[p.result] for p in (site.q, site.k, site.v))
        found = self._choose(site, pick(q, _HEADS, self.rows.clamp_min(0)), k)
        return torch.ops.thresher.important_attention(q, k, v, found.index, site.scale)

    def _above_projections(self, site: AttentionSite, replay: Replay) -> torch.Tensor:
        """The output projection's result [B, n, width], computed for important tokens only."""
        k = replay.env[site.k.result]
        x = site.q.linear.x
        found = self._choose(site, replay.ahead(site.q.result, x, self.rows.clamp_min(0)), k)
        at = found.index if self.counts is None else found.index.clamp_min(0)
        q = replay.ahead(site.q.result, x, at)
        if site.v.result in self.results and self.config.kv != "drop":
            v = pick(replay.env[site.v.result], _HEADS, at)
        else:
            v = replay.ahead(site.v.result, site.v.linear.x, at)
        # Unused places stand last, where causality hides them from every used one.
        out = torch.ops.aten.scaled_dot_product_attention.default(
            q,
            pick(k, _HEADS, at),
            v,
            is_causal=True,
            scale=site.scale,
            enable_gqa=site.heads != site.kv_heads,
        )
        out = replay.ahead(site.o.output, site.node, at, given=out)
        return self._spread(site, out, found.index, replay)

    def _spread(
        self, site: AttentionSite, out: torch.Tensor, index: torch.Tensor, replay: Replay
    ) -> torch.Tensor:
        """out [B, L, width] at its tokens; elsewhere what the projection makes of zeros: its bias, or zero."""
        batch, _, width = out.shape
        length = self.length
        bias = self._bias(site, replay)
        rows = length if self.counts is None else length + 1  # a spare row takes what has no place
        base = out.new_zeros((batch, rows, width)) if bias is None else bias.expand(batch, rows, width)
        if self.counts is None:
            return put(base, (BATCH, SEQUENCE, None), index, out)
        at = torch.where(index < 0, length, index)
        return put(base, (BATCH, SEQUENCE, None), at, out).narrow(1, 0, length)

    def _bias(self, site: AttentionSite, replay: Replay) -> torch.Tensor | None:
        if site.o.bias is None:
            return None
        node = next(n for n in self.program.graph.nodes if n.op == "get_attr" and n.target == site.o.bias)
        return replay.env[node]

    def _returned(self, replay: Replay) -> list[Any]:
        """The caller's results; keys and values of important tokens only, where the others are dropped."""
        owner = {n: s for s in self.chosen for n in (s.k.result, s.v.result)}
        number = {site: i for i, site in enumerate(self.chosen)}
        results = []
        for index, node in enumerate(self.results):
            site = owner.get(node) if isinstance(node, fx.Node) else None
            result: Any = replay.env[node] if isinstance(node, fx.Node) else node
            if site is not None and self.config.kv == "drop":
                at = self.chosen[site].index
                result = pick(result, _HEADS, at if self.counts is None else at.clamp_min(0))
                self.done.shortened[index] = f"important.{number[site]}"
            elif site is not None and self.config.kv == "quantize" and node is site.k.result:
                self.done.scored[index] = f"importance.{number[site]}"
            results.append(result)
        return results

    def _appended(self) -> list[torch.Tensor]:
        values = []
        for number, found in enumerate(self.chosen.values()):
            if self.config.kv == "drop":
                self.done.names.append(f"important.{number}")
                values.append(found.index)
            elif self.config.kv == "quantize":
                self.done.names.append(f"importance.{number}")
                values.append(found.scores)
        self.done.names.append("realised_tau")
        return [*values, torch.stack([found.held for found in self.chosen.values()])]
