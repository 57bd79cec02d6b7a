"""One layer's keys and values under attention: what queries see of them, and when they are compressed.

A step may be compiled. Inside it a layer only joins tensors (`extend`, `attend`); what depends on numbers, how many tokens
were seen and whether it is time to compress, is settled behind it (`advance`), so that one program serves all lengths.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from thresher.kernels import catalog
from thresher.kernels.kv.format import append, quantize

from .slots import KVSlots

catalog.load()


class KVLayer(KVSlots):
    """The past of one attention layer: what attends to it, and what is important enough to stay exact."""

    asked: torch.Tensor | None  # the last compiled step's queries, until `advance`

    def reset(self) -> None:
        super().reset()
        self.asked, self.scale = None, 1.0

    def shown(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """bool [B, 1 or H, queries or 1, slots]: what the queries see; None where they see all slots, causally.

        mask: bool [B or 1, 1 or H, queries, seen] over the sequence's positions, or None for a causal one.
        """
        if mask is None and not self.gaps:
            return None
        positions = self.positions
        held = (positions >= 0)[:, None, None]
        if mask is None:
            return held
        at = positions.clamp_min(0).long()[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        return held & mask.expand(positions.shape[0], -1, -1, -1).gather(3, at)

    def attend(self, q: torch.Tensor, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attention [B, Hq, m, Dv] of the m newest tokens; compresses a full tail afterwards.

        q: [B, Hq, m, D], rotated. mask: see `shown`.
        """
        compiling = torch.compiler.is_compiling()
        shown, queries = self.shown(mask), q.shape[2]
        visible = None if shown is None else shown[:, 0, -1]
        if mask is not None and queries != 1:  # each query sees its own: windows, pads, blocks
            keys, values = self.all_slots()
            grouped = q.shape[1] != keys.shape[1]
            out = scaled_dot_product_attention(q, keys, values, shown, scale=scale, enable_gqa=grouped)
        elif shown is None and not self.pools and not compiling and self.tail == queries:
            grouped = q.shape[1] != self.keys.shape[1]
            out = scaled_dot_product_attention(
                q, self.keys, self.values, is_causal=True, scale=scale, enable_gqa=grouped
            )
        else:
            pools = [t for pool in self.pools for t in pool]
            out = torch.ops.thresher.kv_attention(q, pools, self.keys, self.values, visible, scale)
        self.scale = scale
        if compiling:
            self.asked = None if self.policy.lossless else q
        elif self.fresh >= self.policy.block:
            self._judge(q, None if visible is None else visible[:, -self.fresh :])
        return out

    def advance(self, count: int, real: torch.Tensor | None = None) -> None:
        """Settle a compiled step that appended `count` tokens. real: bool [B, seen], false for padding, or None."""
        self.count(count)
        asked, self.asked = self.asked, None
        if asked is None or self.fresh < self.policy.block:
            return
        if real is not None:
            fresh = self.tail_places[-self.fresh :].t()
            real = (fresh >= 0) & real.gather(1, fresh.clamp_min(0).long())
        self._judge(asked, real)

    def _judge(self, q: torch.Tensor, real: torch.Tensor | None) -> None:
        """Compress the fresh tokens by what these queries attend to. real: bool [B, fresh], or None."""
        if self.policy.lossless:
            return
        self.compress(*self._scores(q, self.scale, real), real)

    def _scores(
        self, q: torch.Tensor, scale: float, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention fresh tokens receive from some of these queries: per row that sees them, and in sum."""
        batch, heads, queries, dim = q.shape
        policy, fresh = self.policy, self.fresh
        if queries == fresh:  # a prompt
            real = torch.ones(batch, fresh, dtype=torch.bool, device=q.device) if real is None else real
            starts, lengths = real.int().argmax(1, keepdim=True), real.sum(1, keepdim=True)
            rows = torch.ops.thresher.probe_positions(
                starts, lengths, policy.recent, policy.spread, policy.seed
            )
        else:
            rows = torch.arange(fresh - min(queries, policy.recent), fresh, device=q.device).expand(batch, -1)
        at = (rows - (fresh - queries)).clamp_min(0)[:, None, :, None].expand(-1, heads, -1, dim)
        segments = None if real is None else real.int() - 1
        keys = self.keys[:, :, -fresh:]
        sums, seen = torch.ops.thresher.probe_scores(q.gather(2, at), keys, rows, segments, scale)
        return sums / seen.clamp_min(1), sums

    def compress(
        self, scores: torch.Tensor | None, sums: torch.Tensor | None = None, real: torch.Tensor | None = None
    ) -> None:
        """Store the fresh tokens by the policy; the tail keeps what is not rounded.

        scores: [B, fresh], the most important highest; None counts every token as important.
        sums: [B, fresh], attention received, for a policy with `important=None`.
        real: bool [B, fresh] or None, false for padding.
        """
        policy, fresh = self.policy, self.fresh
        if policy.lossless:
            return
        batch = self.keys.shape[0]
        if scores is None:
            count = fresh
            scores = torch.zeros(batch, fresh, device=self.device)
        elif policy.important is None:
            count = int(
                torch.ops.thresher.adaptive_count(scores if sums is None else sums, None, policy.tau).max()
            )
        else:
            count = math.ceil(policy.important * fresh)
        pad = None if real is None else ~real
        high = torch.ops.thresher.topk_sorted(scores, None, pad, count, None)
        others = torch.ones(batch, fresh, dtype=torch.bool, device=self.device).scatter_(1, high, False)
        low = (~others).to(torch.int8).argsort(dim=1, stable=True)[:, : fresh - count]
        chosen = [self.fresh_at(index) for index in ([high] if policy.drop else [high, low])]
        self.forget_fresh()
        if policy.bits is None:
            (keys, values, places), *_ = chosen
            self.extend(keys, values, places.t(), seen=self.seen)
        else:
            new = [quantize(*c[:2], bits, policy.block) for c, bits in zip(chosen, policy.bits)]
            new_places = [places for _, _, places in chosen]
            if self.pools:
                new = [append(old, pool) for old, pool in zip(self.pools, new, strict=True)]
                new_places = [torch.cat(pair) for pair in zip(self.places, new_places, strict=True)]
            self.pools, self.places = new, new_places
        self.fresh = 0
