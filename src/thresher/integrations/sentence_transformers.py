"""Embedding and ranking models of sentence-transformers, whose padding a packed model leaves out.

st = SentenceTransformer("all-MiniLM-L6-v2")
thresher.integrations.sentence_transformers.optimize(st, "embed", tokens_per_batch=8192)
st.encode(texts)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ..compiled import Compiled
from ..errors import ArgumentError
from ..progress import progress
from ..recipe import Recipe
from ..strict import compile_strictly
from .batches import groups, token_counts

M = TypeVar("M")
EXAMPLE_TEXTS = (  # mixed lengths, as texts have
    "Thresher keeps the grain.",
    "It leaves the chaff of every harvest where it fell.",
    "What is brought to its floor is beaten, shaken and sieved, and only what feeds somebody is carried home.",
    "Nothing else is weighed or paid for.",
)


def optimize(
    model: M,
    recipe: Any = "embed",
    *,
    texts: Sequence[str] | None = None,
    tokens_per_batch: int | None = None,
    target: str = "inductor",
    **options: Any,
) -> M:
    """Compile the transformer inside a SentenceTransformer or a CrossEncoder, in place; gives the same object back.

    recipe, options, target: as for `thresher.compile`, which raises where nothing could be done. It is compiled once
        for all lengths and numbers of texts above one; a single text is another program, made when it is met.
    texts: what it is compiled and verified on, at least two; by default sentences of mixed lengths.
    tokens_per_batch: batches of up to so many tokens, in the order of the texts: packing makes sorting by length
        needless, and batches of few texts wasteful. It holds for `encode`, `encode_query`, `encode_document`, `predict`
        and `rank` without a pool, a precision or a `batch_size` other than the library's own (32). None leaves batches as
        the library makes them.

    Raises ArgumentError for a model without a transformer inside, or with one that is compiled already.
    """
    holder = _holder(model)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise ArgumentError("tokens_per_batch", tokens_per_batch, "1 or more", "Try 8192.")
    tokenizer, inner = model.tokenizer, holder.model  # type: ignore[attr-defined]
    longest = getattr(model, "max_seq_length", None) or getattr(model, "max_length", None)
    batch = tokenizer(
        list(texts or EXAMPLE_TEXTS), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    device = next(inner.parameters()).device
    given = {name: t.to(device) for name, t in dict(batch).items()}
    inner.eval()
    holder.model = compile_strictly(
        inner, {**given, "return_dict": True}, Recipe.of(recipe, **options), dynamic=True, target=target
    )
    if tokens_per_batch is not None:
        method = "encode" if hasattr(model, "encode") else "predict"
        model.__dict__[method] = _ByTokens(model, method, tokens_per_batch)
    return model


def _holder(model: Any) -> Any:
    """The module of the library's that calls the transformer."""
    for part in model.children() if isinstance(model, torch.nn.Module) else ():
        inner = getattr(part, "model", None)
        if isinstance(inner, Compiled):
            raise ArgumentError(
                "model", "a model that was optimized before", "one as it was loaded", "Load it anew."
            )
        if isinstance(inner, torch.nn.Module) and hasattr(inner, "config"):
            return part
    raise ArgumentError(
        "model",
        type(model).__name__,
        "a SentenceTransformer or CrossEncoder of sentence-transformers 5 or newer with a transformer in PyTorch",
        "Load it without backend=..., or compile another model with thresher.compile.",
    )


class _ByTokens:
    """`encode` or `predict` of one model, over batches of so many tokens."""

    def __init__(self, model: Any, method: str, tokens: int):
        self.model, self.method, self.tokens = model, method, tokens

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = getattr(type(self.model), self.method)
        inputs: Any = args[0] if args else kwargs.get("inputs")
        if len(args) > 1 or not _is_texts(inputs) or not self._left_open(own, kwargs):
            return own(self.model, *args, **kwargs)
        more = {k: v for k, v in kwargs.items() if k not in ("inputs", "batch_size", "show_progress_bar")}
        several: Any = list(self._groups(list(inputs)))
        if kwargs.get("show_progress_bar"):
            several = progress(several, "batches", len(several))
        parts = [
            own(self.model, group, batch_size=len(group), show_progress_bar=False, **more)
            for group in several
        ]
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)
        return (
            np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [row for p in parts for row in p]
        )

    @staticmethod
    def _left_open(own: Any, given: Mapping[str, Any]) -> bool:
        """Whether a call says nothing of batches, processes and codes. The library's `encode_query`, `encode_document` and
        `rank` hand its own batch size on: that is none of the caller's."""
        size, usual = given.get("batch_size"), inspect.signature(own).parameters["batch_size"].default
        elsewhere = given.get("pool") or isinstance(given.get("device"), (list, tuple))
        return size in (None, usual) and not elsewhere and given.get("precision", "float32") == "float32"

    def _groups(self, inputs: list[Any]) -> Iterator[list[Any]]:
        """Texts, or pairs of them, in their order, in groups of up to `tokens` tokens and of one text at least."""
        longest = getattr(self.model, "max_seq_length", None) or getattr(self.model, "max_length", None)
        pairs = inputs if isinstance(inputs[0], str) else [tuple(pair) for pair in inputs]
        for group in groups(token_counts(self.model.tokenizer, pairs, longest), self.tokens):
            yield inputs[group]


def _is_texts(inputs: Any) -> bool:
    """Whether inputs are several texts, or several pairs of texts."""
    if not isinstance(inputs, (list, tuple)) or not inputs:
        return False
    if all(isinstance(i, str) for i in inputs):
        return True
    return all(
        isinstance(i, (list, tuple)) and len(i) == 2 and all(isinstance(t, str) for t in i) for i in inputs
    )
