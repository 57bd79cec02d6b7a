"""A transformers decoder with tokens left out by hand: the model's own layers, on the tokens that were kept.

One call over a prompt and all that follows gives every step's logits: a token never sees what comes later, so that what the
prompt's tokens are does not depend on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "zip_by_hand"


@contextlib.contextmanager
def cut(model: Any, first: int, at: torch.Tensor, length: int) -> Iterator[None]:
    """Within the context, decoder layers from `first` on compute the tokens `at` of a row of `length` only."""
    layers = list(model.get_decoder().layers)[first:]
    for layer in layers:
        layer.forward = _short(layer.forward, at, length)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _short(forward: Any, at: torch.Tensor, length: int) -> Any:
    def gathered(given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            for dim, size in enumerate(given.shape):
                if size == length:
                    given = given.index_select(dim, at)
        elif isinstance(given, tuple):
            given = tuple(map(gathered, given))
        return given

    def short(hidden: torch.Tensor, *args: Any, **named: Any) -> Any:
        assert length not in (hidden.shape[-1], hidden.shape[-1] // 4), "tokens are told by their number"
        out = forward(gathered(hidden), *map(gathered, args), **{k: gathered(v) for k, v in named.items()})
        states = out[0] if isinstance(out, tuple) else out
        whole = hidden.index_copy(1, at, states)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    return short


class Zip:
    """Which tokens of a prompt attend, by the paper's formulas (arXiv 2410.08584, Eq. 7 to 9), text protected.

    options: of the pass. width: of the padded batch. text: bool [tokens] for each row, without its padding. held: slots of
    the prompt in each layer; layers that hold all of them were left alone.
    """

    def __init__(
        self, options: dict[str, Any], width: int, text: Sequence[torch.Tensor], held: Sequence[int]
    ):
        protected = max(int(t.sum()) for t in text)
        share = round(options["keep"] * 4096)
        self.count = min(width, protected - (protected - width) * share // 4096)
        self.options, self.text = options, text
        self.whole = [slots >= width for slots in held]

    def of(self, row: int) -> Any:
        """For one row: what is given a layer, its queries and keys [1, heads, tokens, D], and gives the tokens that attend,
        or None for a layer left alone."""
        text = self.text[row]
        length = len(text)

        def chosen(layer: int, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor | None:
            if self.whole[layer]:
                return None
            recent, spread = self.options["recent"], self.options["spread"]
            starts = torch.zeros(1, 1).long()
            rows = torch.ops.thresher.probe_positions(starts, starts + length, recent, spread, 0)[0]
            rows = rows[rows >= 0]
            seen = torch.arange(length) <= rows[:, None]
            scores = q[0][:, rows] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).mT * scale
            sums = scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(1).mean(0)
            rank = (sums / seen.sum(0).clamp_min(1)).masked_fill(text, torch.inf)
            return rank.topk(min(self.count, length)).indices.sort().values

        return chosen


@contextlib.contextmanager
def zipped(model: Any, chosen: Any, prompt: int) -> Iterator[None]:
    """Within the context, in each layer of the decoder only chosen tokens of the prompt attend and are attended to."""
    numbers = {id(m): i for i, layer in enumerate(model.get_decoder().layers) for m in layer.modules()}

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **other: Any) -> Any:
        layer = numbers.get(id(module))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        kept = None if layer is None else chosen(layer, q[:, :, :prompt], k[:, :, :prompt], scale)
        if kept is None:
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **other)
        at = torch.cat([kept, torch.arange(prompt, q.shape[2])])
        some = [t[:, :, at] for t in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *some, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        whole = q.new_zeros(*q.shape[:3], v.shape[-1]).index_copy(2, at, out)
        return whole.transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    text = model.config.get_text_config(decoder=True)
    before, text._attn_implementation = text._attn_implementation, NAME
    try:
        yield
    finally:
        text._attn_implementation = before
