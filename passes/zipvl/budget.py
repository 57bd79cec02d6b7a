"""How many tokens attend in ZipVL, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from thresher.graph.call_rules import Rule, rule
from thresher.graph.program import Program

from ..structure.recover import LayerSite
from ..tokens.towers import layer_flops
from ..tokens.types import Types, image_counts, types_from

Behind = Callable[[Sequence[int], Sequence[int]], list[int]]


def budget(length: Any, share: float, protected: Any, bucket: int) -> Any:
    """How many tokens attend: the protected ones and a share of the others, in whole buckets; at most all.

    length may be symbolic, or with `protected` an int64 tensor of one entry a sequence.
    """
    parts = 4096
    beside = length - protected
    kept = protected + (beside * round(share * parts) + parts - 1) // parts
    kept = (kept + bucket - 1) // bucket * bucket
    if isinstance(length, torch.Tensor):
        return torch.minimum(kept.clamp_min(1), length)
    return min(kept, length) if isinstance(length, int) else torch.sym_min(torch.sym_max(kept, 1), length)


@dataclass(frozen=True)
class SequenceBudget:
    """Budgets of a packed program's sequences, each as it would be alone.

    A sequence with no more tokens than probes keeps them all.
    """

    config: Any
    share: float
    text: bool  # image tokens are known, and all others protected

    def protected(self, text: Any) -> Any:
        """Protected tokens of a sequence with so many text tokens; int or int64 tensor."""
        config = self.config
        if config.mode == "paper":
            return 0 * text
        if not self.text:
            return 0 * text + config.recent + config.sinks
        return -(-text // config.bucket) * config.bucket

    def kept(self, length: Any, text: Any) -> Any:
        """Tokens that attend, of sequences with so many tokens; ints or int64 tensors."""
        config = self.config
        few = length <= config.recent + config.spread
        kept = budget(length, self.share, self.protected(text), config.bucket)
        return torch.where(few, length, kept) if isinstance(length, torch.Tensor) else length if few else kept


@dataclass(frozen=True)
class CallLengths:
    """Tokens and image tokens of each packed sequence of a call.

    types: where types come from in the caller's inputs, and asked: the program that reads them.
    behind: what each cut before leaves of a sequence.
    """

    types: Types
    asked: Program | None
    behind: tuple[Behind, ...] = ()

    def __call__(self, lengths: Sequence[int], inputs: Sequence[Any]) -> list[tuple[int, int]]:
        """(tokens, text tokens) of each sequence behind the cuts. lengths: of all, filler last where there is some."""
        images = [0] * len(lengths)
        if self.types.kind != "none":
            values = self.asked.run(*inputs) if self.asked is not None else []
            found = image_counts(self.types, values, inputs)[0] or []
            images[: len(found)] = found
        left = list(lengths)
        for cut in self.behind:
            left = cut(lengths, images)
        return [(n, whole - image) for n, whole, image in zip(left, lengths, images)]


def zip_flops(layer: LayerSite, length: int, kept: int, probes: int, gather: str) -> float:
    """FLOPs of a layer rewritten so, probes included; a multiply-add counts as two."""
    site = layer.attention
    assert site is not None
    linears, attention = layer_flops(layer, length, kept)
    if gather == "projections" and site.apart:
        q, v, o = (2 * s.in_features * s.out_features for s in (site.q.linear, site.v.linear, site.o))
        linears -= (q + o + v) * (length - kept) - q * probes
    return linears + attention + 2 * probes * length * site.heads * site.head_dim


def protected_tokens(types: Types, config: Any, values: Sequence[Any], inputs: Sequence[Any]) -> int:
    """The most protected tokens of any row, rounded up to whole buckets."""
    if config.mode == "paper":
        return 0
    if types.kind == "none":
        return config.recent + config.sinks
    images, pads = image_counts(types, values, inputs)
    if images is None:
        return config.recent + config.sinks
    length = types.length(values, inputs)
    most = max(length - image - pad for image, pad in zip(images, pads))
    return -(-most // config.bucket) * config.bucket


def budget_facts(config: Any) -> dict[str, Any]:
    """What the number of tokens that attend is decided by, of a config of ZipVL."""
    return {name: getattr(config, name) for name in ("mode", "bucket", "recent", "spread", "sinks")}


@rule("zipvl.protected")
def _protected(facts: Any, _: Any, values: Sequence[Any], inputs: Sequence[Any]) -> tuple[int, ...]:
    """Protected tokens of a call; see `Choice.decide`."""
    config = SimpleNamespace(**facts["config"])
    return (protected_tokens(types_from(facts["types"]), config, values, inputs),)


@rule("zipvl.places")
def _places(facts: Any, asked: Program | None, lengths: Sequence[int], inputs: Sequence[Any]) -> int:
    """Tokens that attend in a call, all packed sequences together; see `Counted`."""
    types = types_from(facts["types"])
    known = CallLengths(types, asked, tuple(Rule(**cut) for cut in facts["behind"]))(lengths, inputs)
    kept = SequenceBudget(SimpleNamespace(**facts["config"]), facts["share"], types.kind == "ids").kept
    return max(2, sum(kept(n, text) for n, text in known))
