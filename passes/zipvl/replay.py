"""Builds the rewritten attention of ZipVL, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.packed_layout import Counted, PackedLayout, Passed, Scatter
from thresher.graph.program import Program
from thresher.graph.sizes import example_of, expect, free_number, symbol_of

from ..structure.recover import AttentionSite
from ..tokens.axes import BATCH, SEQUENCE
from ..tokens.frame import pick, put
from ..tokens.replay import Replay, packed_attention
from ..tokens.retrace import retrace
from .budget import SequenceBudget, budget
from .choice import Chosen, Tokens

HEADS = (BATCH, None, SEQUENCE, None)


@dataclass
class Done:
    """names: of the results appended. shortened: caller's result -> its kept tokens' name. scored: likewise."""

    names: list[str] = field(default_factory=list)
    shortened: dict[int, str] = field(default_factory=dict)
    scored: dict[int, str] = field(default_factory=dict)


def rewrite_layers(
    program: Program, plan: Any, config: Any, extra: Sequence[str], sizes: Mapping[Any, Counted]
) -> Done:
    """Rewrite a program's attentions in place, as `zipvl.ZipPlan` says.

    extra: inputs to append, by name. sizes: of a packed program, how many tokens attend in each stretch and at
    each share; they become inputs too.
    """
    builder = _Builder(program, plan, config, sizes)
    like = value(plan.stretches[0].start)
    fakes: dict[str, Any] = {}
    with program.fake_mode():
        for name in extra:
            fakes[name] = torch.empty(like.shape[:2], dtype=torch.int8, device=like.device)
    for name in builder.places.values():
        fakes[name] = symbol_of(
            program.fake_mode(), free_number(program, plan.stretches[0].length // 2), name
        )
    retrace(program, builder.replay, fakes)
    if program.packing is not None:
        program.packing = builder.layout(program.packing, list(sizes.values()))
    return builder.done


class _Builder:
    def __init__(self, program: Program, plan: Any, config: Any, sizes: Mapping[Any, Counted]):
        self.program, self.plan, self.config = program, plan, config
        self.results = program.outputs
        self.done = Done()
        self.shares = {layer.attention: share for layer, share in plan.layers}
        self.stretches = {s.start: s for s in plan.stretches}
        self.places = {key: f"attending_{i}" for i, key in enumerate(sizes)}
        projections = config.gather == "projections"
        self.whole = {s.o.output: s for s in self.shares if projections and s.apart}
        self.inner = {s.node: s for s in self.shares if not (projections and s.apart)}
        self.chosen: dict[AttentionSite, Chosen] = {}

    def replay(self, env: dict[Any, Any], extra: Mapping[str, Any]) -> list[Any]:
        self.chosen, self.done = {}, Done()
        known = self.program.calls.extra_inputs if self.program.calls is not None else []
        given = dict(zip(known, self.program.placeholders[len(self.program.placeholders) - len(known) :]))
        env = {**env, **{name: env[place] for name, place in given.items()}, **extra}
        replay = Replay(self.plan.stretches[0].axes, env, None)
        tokens: Tokens | None = None
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                if node in self.whole:
                    env[node] = self._above_projections(self.whole[node], replay)
                elif node in self.inner:
                    env[node] = self._attention(self.inner[node], replay)
                else:
                    replay.compute(node)
            if node in self.stretches:
                self.stretch = self.stretches[node]
                replay = Replay(self.stretch.axes, env, None)
                self.tokens = tokens = Tokens(self.plan, self.config, self.stretch, env, tokens)
                replay.root.length = tokens.length
        return [*self._returned(env), *self._appended()]

    def layout(self, layout: PackedLayout, sizes: list[Counted]) -> PackedLayout:
        """How the rewritten body is called, and where its additional results are."""
        first = len(self.results)
        scores = [
            Scatter(first + i, 0, 1) for i, n in enumerate(self.done.names) if n.startswith("importance")
        ]
        held = Passed("body", first + len(self.done.names) - 1)
        places = {r.index: i for i, r in enumerate(layout.results) if isinstance(r, Scatter)}
        self.done.scored = {places[i]: name for i, name in self.done.scored.items() if i in places}
        return replace(layout, arguments=[*layout.arguments, *sizes], extras=(*layout.extras, *scores, held))

    def _choose(self, site: AttentionSite, q: torch.Tensor, k: torch.Tensor, replay: Replay) -> Chosen:
        """The important tokens of one layer. q: [B, Hq, P, D] of the probe rows; k: [B, Hkv, n, D]."""
        here, share = self.tokens, self.shares[site]
        sums, seen = torch.ops.thresher.probe_scores(q, k, here.rows, here.segments, site.operator_scale)
        scores = sums / seen.clamp_min(1)
        if here.packed is not None:
            self.chosen[site] = self._choose_packed(share, sums, scores, replay)
            return self.chosen[site]
        exact = self.config.counts == "exact"
        if exact:
            index = self._holding(share, sums, scores)
        else:
            count = budget(here.length, share, self.plan.protected, self.config.bucket)
            index = torch.ops.thresher.topk_sorted(scores, here.protected, here.pad, count, here.counts)
        at, to = index, None
        if here.counts is not None or (exact and here.batch != 1):
            at, to = index.clamp_min(0), torch.where(index < 0, here.length, index)
        held = sums.gather(1, at)
        if to is not None:
            held = held.masked_fill(index < 0, 0.0)
        held = held.sum(1) / sums.sum(1).clamp_min(1e-12)
        self.chosen[site] = Chosen(index, at, to, scores, held, None, here.origin)
        return self.chosen[site]

    def _holding(self, share: float, sums: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As few tokens as hold tau in this call, int64 [B, k]; k is a size that the data decide."""
        here = self.tokens
        index = torch.ops.thresher.tokens_holding(sums, scores, here.protected, here.pad, self.config.tau)
        length = example_of(here.length)
        expect(index.shape[1], budget(length, share, min(self.plan.protected, length), 1))
        return index

    def _choose_packed(
        self, share: float, sums: torch.Tensor, scores: torch.Tensor, replay: Replay
    ) -> Chosen:
        here, segments = self.tokens, self.tokens.packed
        assert segments is not None and here.segments is not None
        counts = SequenceBudget(self.config, share, self.plan.types.kind != "none").kept(
            segments.lengths, here.text
        )
        places = replay.env[self.places[(self.stretch, share)]]
        index, offsets, real = segments.choose(scores, here.protected, counts, places)
        to = torch.where(real[None], index, here.length)
        chosen = torch.zeros_like(sums).scatter(1, index, real.to(sums.dtype)[None])
        owner = here.segments[0].long()
        both = sums.new_zeros((2, segments.offsets.shape[0])).index_add(
            1, owner, torch.cat([sums * chosen, sums])
        )[:, : segments.count]
        held = both[0] / both[1].clamp_min(1e-12)
        return Chosen(index, index, to, scores, held, offsets)

    def _among(
        self, site: AttentionSite, qkv: Sequence[torch.Tensor], found: Chosen, replay: Replay
    ) -> torch.Tensor:
        """Causal attention among chosen tokens, [B, Hq, L, Dv]."""
        q, k, v = qkv
        if found.offsets is not None:
            longest: Any = site.node.args[4]
            longest = replay.env[longest] if isinstance(longest, fx.Node) else longest
            return packed_attention()(q, k, v, found.offsets, longest, site.operator_scale, True, -1, 0.0)
        # Unused places stand last, where causality hides them from every used one.
        return torch.ops.aten.scaled_dot_product_attention.default(
            q, k, v, is_causal=True, scale=site.operator_scale, enable_gqa=site.heads != site.kv_heads
        )

    def _attention(self, site: AttentionSite, replay: Replay) -> torch.Tensor:
        q, k, v = (replay.env[p.result] for p in (site.q, site.k, site.v))
        found = self._choose(site, pick(q, HEADS, self.tokens.rows.clamp_min(0)), k, replay)
        if found.offsets is None:
            return torch.ops.thresher.important_attention(q, k, v, found.index, site.operator_scale)
        out = self._among(site, [pick(t, HEADS, found.at) for t in (q, k, v)], found, replay)
        return self._spread(out, HEADS, found, None)

    def _above_projections(self, site: AttentionSite, replay: Replay) -> torch.Tensor:
        """The output projection's result [B, n, width], computed for important tokens only."""
        k = replay.env[site.k.result]
        x = site.q.linear.x
        probes = replay.ahead(site.q.result, x, self.tokens.rows.clamp_min(0))
        found = self._choose(site, probes, k, replay)
        q = replay.ahead(site.q.result, x, found.at)
        if site.v.result in self.results and self.config.kv != "drop":
            v = pick(replay.env[site.v.result], HEADS, found.at)
        else:
            v = replay.ahead(site.v.result, site.v.linear.x, found.at)
        out = self._among(site, [q, pick(k, HEADS, found.at), v], found, replay)
        out = replay.ahead(site.o.output, site.node, found.at, given=out)
        return self._spread(out, (BATCH, SEQUENCE, None), found, self._bias(site, replay))

    def _spread(
        self, out: torch.Tensor, labels: Any, found: Chosen, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`out` at its tokens; elsewhere what the projection makes of zeros: its bias, or zero."""
        dim = labels.index(SEQUENCE)
        shape = list(out.shape)
        shape[dim] = self.tokens.length + (found.to is not None)  # a spare row takes what has no place
        base = out.new_zeros(shape) if bias is None else bias.expand(shape)
        if found.to is None:
            return put(base, labels, found.at, out)
        return put(base, labels, found.to, out).narrow(dim, 0, self.tokens.length)

    def _bias(self, site: AttentionSite, replay: Replay) -> torch.Tensor | None:
        if site.o.bias is None:
            return None
        node = next(n for n in self.program.graph.nodes if n.op == "get_attr" and n.target == site.o.bias)
        return replay.env[node]

    def _returned(self, env: Mapping[Any, Any]) -> list[Any]:
        """The caller's results; keys and values of important tokens only, where the others are dropped."""
        owner = {n: s for s in self.chosen for n in (s.k.result, s.v.result)}
        number = {site: i for i, site in enumerate(self.chosen)}
        results = []
        for index, node in enumerate(self.results):
            site = owner.get(node) if isinstance(node, fx.Node) else None
            result: Any = env[node] if isinstance(node, fx.Node) else node
            if site is not None and self.config.kv == "drop":
                result = pick(result, HEADS, self.chosen[site].at)
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
                values.append(found.in_prompt())
            elif self.config.kv == "quantize":
                self.done.names.append(f"importance.{number}")
                values.append(found.scores)
        self.done.names.append("realised_tau")
        return [*values, torch.stack([found.held for found in self.chosen.values()])]
