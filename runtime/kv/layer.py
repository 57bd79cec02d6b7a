"""One layer's keys and values: quantized pools behind, a full-precision tail in front.

A step may be compiled. Inside it a layer only joins tensors (`extend`, `attend`); what depends on numbers, how many tokens
were seen and whether it is time to compress, is settled behind it (`advance`), so that one program serves all lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin

from thresher.errors import ArgumentError
from thresher.kernels import catalog
from thresher.kernels.kv.format import Pool, append, dequantize, quantize

from .policy import KVPolicy

catalog.load()


class KVLayer(CacheLayerMixin):
    """The past of one attention layer.

    A slot holds one token: first the pools' slots (important tokens, then the others), then the tail's.
    `seen` counts every token ever given, so that new tokens get the right position even where some
    were dropped. The newest `fresh` tokens have not been through `compress` yet.
    """

    is_sliding = False
    keys: torch.Tensor  # of the tail, [B, Hkv, tail, D]; None until the first tokens come
    values: torch.Tensor
    tail_places: (
        torch.Tensor
    )  # int32 [tail, B]: this way round, a row of none or one is laid out like any other
    asked: torch.Tensor | None  # the last compiled step's queries, until `advance`

    def __init__(self, policy: KVPolicy):
        super().__init__()
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = self.tail_places = None  # type: ignore[assignment]
        self.is_initialized = False
        self.fresh = 0
        self.clock = torch.empty(
            0, 0
        )  # of `seen` rows: a compiled step reads a size, where a number would be a constant
        self.pools: list[Pool] = []
        self.places: list[torch.Tensor] = []  # int32 [slots, B], the position of each token, of each pool
        self.gaps = False  # some slots hold no token: their position is -1
        self.asked, self.scale = None, 1.0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.tail_places = torch.empty(0, key_states.shape[0], dtype=torch.int32, device=self.device)
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Elsewhere a rollback may reach into what is already compressed."""
        return self.policy.lossless

    @property
    def seen(self) -> int:
        return self.clock.shape[0]

    @property
    def tail(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def positions(self) -> torch.Tensor:
        """int32 [B, slots], the position of each slot's token; -1 where there is none."""
        return torch.cat([*self.places, self.tail_places]).t()

    @property
    def slots(self) -> int:
        return sum(pool.slots for pool in self.pools) + self.tail

    @property
    def bytes(self) -> int:
        """Bytes held, positions included."""
        if not self.is_initialized:
            return 0
        held = [self.keys, self.values, self.tail_places, *self.places]
        return sum(t.numel() * t.element_size() for t in held) + sum(pool.bytes for pool in self.pools)

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def extend(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        seen: int | None = None,
    ) -> None:
        """Append tokens to the tail.

        keys, values: [B, Hkv, m, D], keys rotated. positions: int [B, m], rising, -1 for a slot that
        holds no token; by default the next m. seen: the sequence's length with these, dropped tokens
        included; by default m more than before.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        batch, _, count, _ = keys.shape
        if positions is None:
            positions = torch.arange(self.seen, self.seen + count, device=keys.device).expand(batch, -1)
        elif positions.shape != (batch, count) or positions.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                "positions",
                f"{positions.dtype} {tuple(positions.shape)}",
                f"int [{batch}, {count}]",
                "One a token.",
            )
        else:
            self.gaps = self.gaps or bool((positions < 0).any())
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        self.tail_places = torch.cat([self.tail_places, positions.int().t()])
        if not torch.compiler.is_compiling():
            self._count(count, seen)

    def _count(self, new: int, seen: int | None = None) -> None:
        self.fresh += new
        self.clock = torch.empty(self.seen + new if seen is None else seen, 0)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append new tokens and return the tail."""
        self.extend(key_states, value_states)
        return self.keys, self.values

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
            keys, values = self._all()
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
        self._count(count)
        asked, self.asked = self.asked, None
        if asked is None or self.fresh < self.policy.block:
            return
        if real is not None:
            fresh = self.tail_places[-self.fresh :].t()
            real = (fresh >= 0) & real.gather(1, fresh.clamp_min(0).long())
        self._judge(asked, real)

    def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, Hkv, slots, D] of all slots, as they lie."""
        if not self.pools:
            return self.keys, self.values
        parts = [dequantize(pool) for pool in self.pools] + [(self.keys, self.values)]
        keys, values = (torch.cat([t.to(self.dtype) for t in side], 2) for side in zip(*parts, strict=True))
        return keys, values

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
        chosen = [self._fresh(index) for index in ([high] if policy.drop else [high, low])]
        self._forget_fresh()
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

    def _fresh(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions of fresh tokens `index` [B, k]."""
        index = index + self.tail - self.fresh
        at = index[:, None, :, None]
        keys, values = (
            t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in (self.keys, self.values)
        )
        return keys, values, self.tail_places.gather(0, index.t())

    def _forget_fresh(self) -> None:
        """Drop the fresh tokens from the tail, and give back the memory that a long prompt took."""
        rest = self.tail - self.fresh
        self.keys, self.values = self.keys[:, :, :rest].clone(), self.values[:, :, :rest].clone()
        self.tail_places = self.tail_places[:rest].clone()
        self.fresh = 0

    def restore(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, Hkv, seen, D] of the whole sequence, in order. Refused once any is gone."""
        if self.slots != self.seen or self.gaps:
            raise ArgumentError(
                "cache",
                f"{self.slots} of {self.seen} tokens",
                "a cache that dropped none, for attention that wants them all",
                "Call model.set_attn_implementation('thresher_kv').",
            )
        keys, values = self._all()
        order = self.positions.argsort(1)[:, None, :, None]
        return keys.gather(2, order.expand_as(keys)), values.gather(2, order.expand_as(values))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; only those not compressed yet can be."""
        count = -tokens_to_remove
        if not 0 <= count <= (self.seen if self.policy.lossless else self.fresh):
            raise ArgumentError(
                "tokens_to_remove",
                tokens_to_remove,
                f"-{self.fresh} to 0: older tokens are compressed",
                "Keep a copy of the cache to go back further.",
            )
        end = self.seen - count
        self.clock = torch.empty(end, 0)
        if not self.is_initialized or not count:
            return
        late = self.tail_places >= end
        last = int(late[:, 0].sum())
        if bool((late.sum(0) == last).all()) and bool(late[self.tail - last :].all()):
            rest = self.tail - last
            self.keys, self.values = self.keys[:, :, :rest], self.values[:, :, :rest]
            self.tail_places = self.tail_places[:rest]
            self.fresh -= min(last, self.fresh)
        else:  # rows kept different tokens of the stretch that goes
            self.tail_places, self.gaps = self.tail_places.masked_fill(late, -1), True

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.tail_places = change(self.tail_places.t()).t().contiguous()
            self.places = [change(t.t()).t().contiguous() for t in self.places]
            self.pools = [Pool._make([*map(change, pool[:4]), pool.ends]) for pool in self.pools]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each_row(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each_row(lambda t: t[indices])
