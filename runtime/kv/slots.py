"""One layer's keys and values as they lie: quantized pools behind, a full-precision tail in front.

Tokens come into the tail (`extend`) and may go again (`crop`); rows are repeated and reordered. `layer` attends to
them and moves them into the pools.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin

from thresher.errors import ArgumentError
from thresher.kernels.kv.format import Pool, dequantize

from .policy import KVPolicy


class KVSlots(CacheLayerMixin):
    """The past of one attention layer as it lies.

    A slot holds one token: first the pools' slots (important tokens, then the others), then the tail's.
    `seen` counts every token ever given, so that new tokens get the right position even where some
    were dropped. The newest `fresh` tokens have not been compressed yet.
    """

    is_sliding = False
    keys: torch.Tensor  # of the tail, [B, Hkv, tail, D]; None until the first tokens come
    values: torch.Tensor
    tail_places: (
        torch.Tensor
    )  # int32 [tail, B]: this way round, a row of none or one is laid out like any other

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
            self.count(count, seen)

    def count(self, new: int, seen: int | None = None) -> None:
        """Take note of `new` tokens in the tail. seen: the sequence's length with them; by default `new` more."""
        self.fresh += new
        self.clock = torch.empty(self.seen + new if seen is None else seen, 0)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append new tokens and return the tail."""
        self.extend(key_states, value_states)
        return self.keys, self.values

    def all_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, Hkv, slots, D] of all slots, as they lie."""
        if not self.pools:
            return self.keys, self.values
        parts = [dequantize(pool) for pool in self.pools] + [(self.keys, self.values)]
        keys, values = (torch.cat([t.to(self.dtype) for t in side], 2) for side in zip(*parts, strict=True))
        return keys, values

    def fresh_at(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions of fresh tokens `index` [B, k]."""
        index = index + self.tail - self.fresh
        at = index[:, None, :, None]
        keys, values = (
            t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in (self.keys, self.values)
        )
        return keys, values, self.tail_places.gather(0, index.t())

    def forget_fresh(self) -> None:
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
        keys, values = self.all_slots()
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
