"""One layer's keys and values: quantized pools behind, a full-precision tail in front."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin

from thresher.errors import ArgumentError
from thresher.kernels import catalog
from thresher.kernels.kv.format import Pool, append, dequantize, quantize

catalog.load()


@dataclass(frozen=True)
class KVPolicy:
    """How a layer stores its past.

    important: share of tokens stored as important, above 0, at most 1; or None to take as many as hold
        a share `tau` of the probes' attention (one count for the whole batch, its largest).
    bits: bits of important and of other tokens; None keeps full precision.
    drop: forget the other tokens (ZipVL's second version) instead of storing them at fewer bits.
    block: a tail of so many tokens is compressed; also the slots that share a key's scale.
    recent, spread, seed: the rows whose attention tells what is important (`probe_positions`).
    """

    important: float | None = 0.3
    tau: float = 0.975
    bits: tuple[int, int] | None = (4, 2)
    drop: bool = False
    block: int = 128
    recent: int = 64
    spread: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.important is not None and not 0.0 < self.important <= 1.0:
            raise ArgumentError(
                "important", self.important, "a share above 0, at most 1, or None", "Try 0.3."
            )
        if self.bits is not None and not set(self.bits) <= {2, 4, 8}:
            raise ArgumentError("bits", self.bits, "two of 2, 4 and 8, or None", "Use (4, 2).")
        if self.block < 1:
            raise ArgumentError("block", self.block, "at least 1 token", "128 is usual.")
        if self.bits is None and not self.drop:
            raise ArgumentError(
                "bits",
                None,
                "two bit widths unless drop=True",
                "A cache that neither rounds nor drops is DynamicCache.",
            )


class KVLayer(CacheLayerMixin):
    """The past of one attention layer.

    A slot holds one token: first the pools' slots (important tokens, then the others), then the tail's.
    `seen` counts every token ever given, so that new tokens get the right position even where some
    were dropped. The newest `fresh` tokens have not been through `compress` yet.
    """

    is_sliding = False
    keys: torch.Tensor  # buffers of the tail, which may be longer than it; None until the first tokens come
    values: torch.Tensor
    tail_places: torch.Tensor  # int32 [B, tail]
    is_croppable = False  # a rollback may reach into what is already compressed

    def __init__(self, policy: KVPolicy):
        super().__init__()
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = self.tail_places = None  # type: ignore[assignment]
        self.is_initialized = False
        self.tail = self.fresh = self.seen = 0
        self.pools: list[Pool] = []
        self.places: list[torch.Tensor] = []  # int32 [B, slots], the position of each token, of each pool
        self.gaps = False  # some slots hold no token: their position is -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.tail_places = torch.empty(key_states.shape[0], 0, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    @property
    def tail_keys(self) -> torch.Tensor:
        return self.keys[:, :, : self.tail]

    @property
    def tail_values(self) -> torch.Tensor:
        return self.values[:, :, : self.tail]

    @property
    def positions(self) -> torch.Tensor:
        """int32 [B, slots], the position of each slot's token; -1 where there is none."""
        return torch.cat([*self.places, self.tail_places], dim=1)

    @property
    def slots(self) -> int:
        return sum(pool.slots for pool in self.pools) + self.tail

    @property
    def bytes(self) -> int:
        """Bytes held, spare room and positions included."""
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
        end = self.tail + count
        if end > self.keys.shape[2]:
            self._make_room(end + (self.policy.block if self.tail or count == 1 else 0))
        self.keys[:, :, self.tail : end] = keys
        self.values[:, :, self.tail : end] = values
        self.tail_places = torch.cat([self.tail_places, positions.int()], dim=1)
        self.tail, self.fresh = end, self.fresh + count
        self.seen = self.seen + count if seen is None else seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append new tokens and return the tail."""
        self.extend(key_states, value_states)
        return self.tail_keys, self.tail_values

    def _make_room(self, slots: int) -> None:
        """Move the tail into buffers of so many slots."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], slots, old.shape[3]))
            new[:, :, : self.tail] = old[:, :, : self.tail]
            setattr(self, name, new)

    def visible(self, real: torch.Tensor | None) -> torch.Tensor | None:
        """bool [B, slots], false where a slot holds no token or padding; None where all hold one.

        real: bool [B, seen] or None, false for padding.
        """
        if real is None and not self.gaps:
            return None
        positions = self.positions
        held = positions >= 0
        return held if real is None else held & real.gather(1, positions.clamp_min(0).long())

    def attend(self, q: torch.Tensor, scale: float, real: torch.Tensor | None = None) -> torch.Tensor:
        """Attention [B, Hq, m, Dv] of the m newest tokens; compresses a full tail afterwards.

        q: [B, Hq, m, D], rotated. real: bool [B, seen] or None, false for padding.
        """
        visible = self.visible(real)
        keys, values = self.tail_keys, self.tail_values
        if not self.pools and visible is None and self.tail == q.shape[2]:
            grouped = q.shape[1] != keys.shape[1]
            out = scaled_dot_product_attention(
                q, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
            )
        else:
            pools = [t for pool in self.pools for t in pool]
            out = torch.ops.thresher.kv_attention(q, pools, keys, values, visible, scale)
        if self.fresh >= self.policy.block:
            real = None if visible is None else visible[:, -self.fresh :]
            self.compress(*self._scores(q, scale, real), real)
        return out

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
        keys = self.tail_keys[:, :, -fresh:]
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
            self.extend(keys, values, places, seen=self.seen)
        else:
            new = [quantize(*c[:2], bits, policy.block) for c, bits in zip(chosen, policy.bits)]
            new_places = [places for _, _, places in chosen]
            if self.pools:
                new = [append(old, pool) for old, pool in zip(self.pools, new, strict=True)]
                new_places = [torch.cat(pair, 1) for pair in zip(self.places, new_places, strict=True)]
            self.pools, self.places = new, new_places
        self.fresh = 0

    def _fresh(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions of fresh tokens `index` [B, k]."""
        index = index + self.tail - self.fresh
        at = index[:, None, :, None]
        tails = (self.tail_keys, self.tail_values)
        keys, values = (t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in tails)
        return keys, values, self.tail_places.gather(1, index)

    def _forget_fresh(self) -> None:
        """Drop the fresh tokens from the tail, and give back the room a long prompt took."""
        self.tail -= self.fresh
        self.tail_places = self.tail_places[:, : self.tail].clone()
        self._make_room(self.tail + self.policy.block)
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
        parts = [dequantize(pool) for pool in self.pools] + [(self.tail_keys, self.tail_values)]
        keys, values = (torch.cat([t.to(self.dtype) for t in side], 2) for side in zip(*parts, strict=True))
        order = self.positions.argsort(1)[:, None, :, None]
        return keys.gather(2, order.expand_as(keys)), values.gather(2, order.expand_as(values))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; only those not compressed yet can be."""
        count = -tokens_to_remove
        if not 0 <= count <= self.fresh:
            raise ArgumentError(
                "tokens_to_remove",
                tokens_to_remove,
                f"-{self.fresh} to 0: older tokens are compressed",
                "Keep a copy of the cache to go back further.",
            )
        self.tail, self.fresh, self.seen = self.tail - count, self.fresh - count, self.seen - count
        if self.is_initialized:
            self.tail_places = self.tail_places[:, : self.tail]

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values, self.tail_places = map(change, (self.keys, self.values, self.tail_places))
            self.places = [change(t) for t in self.places]
            self.pools = [Pool._make([*map(change, pool[:4]), pool.ends]) for pool in self.pools]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each_row(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each_row(lambda t: t[indices])
