"""Tells pruning passes which tokens are an image's, where a model's own inputs do not.

    with thresher.token_types(types):
        model(inputs_embeds=embeddings)

Most models need none of this: the passes find image tokens in the graph. It serves models that are
called with embeddings, and scores of your own (`policy="given"`).

Models whose forward breaks into several graphs hand embeddings from the graph that puts image features
in to the graph of the language model. The first publishes which tokens these were, for exactly the tensor
it returned, and the second looks its own input up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import ArgumentError

TEXT, IMAGE, VIDEO, PAD = 0, 1, 2, -1
_GIVEN: ContextVar[dict[str, torch.Tensor] | None] = ContextVar("thresher_tokens", default=None)


@contextlib.contextmanager
def token_types(types: torch.Tensor, scores: torch.Tensor | None = None) -> Iterator[None]:
    """Within the context, calls of compiled models have these token types.

    types: int8 [B, n]; 0 text, 1 image, 2 video, -1 padding.
    scores: float [B, n] or None, for `policy="given"`: the highest are kept.
    """
    if not isinstance(types, torch.Tensor) or types.dim() != 2 or types.is_floating_point():
        raise ArgumentError(
            "types",
            f"{getattr(types, 'dtype', type(types).__name__)} {tuple(getattr(types, 'shape', ()))}",
            "an integer tensor [batch, tokens]: 0 text, 1 image, 2 video, -1 padding",
            "Give every token its type.",
        )
    given = {"token_types": types.to(torch.int8)}
    if scores is not None:
        if scores.shape != types.shape:
            raise ArgumentError(
                "scores",
                f"shape {tuple(scores.shape)}",
                f"{tuple(types.shape)} as types has",
                "Score every token.",
            )
        given["token_scores"] = scores.float()
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given() -> dict[str, torch.Tensor]:
    """Token types and scores of the enclosing `token_types`, by name; empty outside one."""
    return _GIVEN.get() or {}


_PUBLISHED = WeakTensorKeyDictionary()


def publish(embeddings: torch.Tensor, types: torch.Tensor) -> None:
    """Say which tokens of these embeddings [B, n, d] are image features. types: bool or int8 [B, n]."""
    _PUBLISHED[embeddings] = types.to(torch.int8)


def known(inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What is known of a call's tokens, by name: given around the call, published for one of its inputs, or else read
    from its ids."""
    found, types = told(inputs), types_by_ids()
    return found or ({} if types is None else {"token_types": types})


def told(inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """As `known`, of what somebody said for just these tokens."""
    found = given()
    if found:
        return found
    for value in inputs:
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value in _PUBLISHED:
            return {"token_types": _PUBLISHED[value]}
    return {}


_Read = tuple[torch.Tensor | None, torch.Tensor | None]
_IDS: ContextVar[_Read] = ContextVar("thresher_read_from_ids", default=(None, None))
ASKING = "asking_tokens"


@contextlib.contextmanager
def read_from_ids(types: torch.Tensor | None, asking: torch.Tensor | None) -> Iterator[None]:
    """Within the context, this was read from a call's ids, each [B, n] or None where nobody says: token types, int8, for
    graphs in which nothing else tells them; and which tokens are a user's question, bool."""
    token = _IDS.set((types, asking))
    try:
        yield
    finally:
        _IDS.reset(token)


def types_by_ids() -> torch.Tensor | None:
    """int8 [B, n], the types that the enclosing `read_from_ids` names, or None."""
    return _IDS.get()[0]


def asked() -> torch.Tensor | None:
    """bool [B, n], the question that the enclosing `read_from_ids` names, or None."""
    return _IDS.get()[1]


_ABOUT = WeakTensorKeyDictionary()


def note(result: torch.Tensor, **facts: torch.Tensor) -> None:
    """Remember what is known of a result: `kept` int64 [B, L], `scores` float [B, L]."""
    _ABOUT[result] = {**_ABOUT.get(result, {}), **facts}


def about(result: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a pruned program said about one of its results; empty for any other tensor."""
    return dict(_ABOUT.get(result, {}))


_READ: ContextVar[bool] = ContextVar("thresher_kept_is_read", default=False)


@contextlib.contextmanager
def reading_kept() -> Iterator[None]:
    """Within the context, whoever calls a pruned program looks at what it kept (`about`)."""
    token = _READ.set(True)
    try:
        yield
    finally:
        _READ.reset(token)


def kept_is_read() -> bool:
    """Whether the caller asked which tokens were kept, so that programs must give it back."""
    return _READ.get()
