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
    """What is known of a call's tokens, by name: given around the call, or published for one of its inputs."""
    found = given()
    if found:
        return found
    for value in inputs:
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value in _PUBLISHED:
            return {"token_types": _PUBLISHED[value]}
    return {}


_ASKING: ContextVar[torch.Tensor | None] = ContextVar("thresher_asking_tokens", default=None)
ASKING = "asking_tokens"


@contextlib.contextmanager
def asking(tokens: torch.Tensor | None) -> Iterator[None]:
    """Within the context, calls of compiled models have these tokens for a question, bool [B, n]; None: nobody says."""
    token = _ASKING.set(tokens)
    try:
        yield
    finally:
        _ASKING.reset(token)


def asked() -> torch.Tensor | None:
    """bool [B, n], the tokens that the enclosing `asking` names, or None."""
    return _ASKING.get()


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
