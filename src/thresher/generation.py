"""`generate` of transformers, whose steps call the model: here they call the compiled one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .backend import ThresherWarning
from .errors import ArgumentError

EAGER_PREFILL = (
    "generate makes its static cache during the prefill, which transformers does not compile: that call runs as the model "
    "was written, padded. Later steps are compiled. Leave cache_implementation out to have the prefill packed, or prefill "
    "yourself and move the cache (docs/decoding.md)."
)


def generate(compiled: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run `model.generate` with the compiled model in the model's place.

    While it runs, other threads that call the model get the compiled one too.

    Raises ArgumentError for a model without `generate`.
    """
    if not callable(getattr(model, "generate", None)):
        raise ArgumentError(
            "model",
            f"a {type(model).__name__}, which has no generate",
            "a model with generate, such as transformers' ...ForCausalLM",
            "Call the compiled model step by step.",
        )
    written, attribute = model.forward, model.__dict__.get("forward")

    @functools.wraps(written)
    def forward(*inputs: Any, **named: Any) -> Any:
        if _starts_static(named):
            warnings.warn(EAGER_PREFILL, ThresherWarning, stacklevel=2)
            return written(*inputs, **named)
        put_back()  # what is compiled is the model's own
        try:
            return compiled(*inputs, **named)
        finally:
            model.__dict__["forward"] = forward

    def put_back() -> None:
        del model.__dict__["forward"]
        if attribute is not None:
            model.__dict__["forward"] = attribute

    model.__dict__["forward"] = forward
    try:
        return model.generate(*args, **kwargs)  # type: ignore[operator]
    finally:
        put_back()


def _starts_static(named: dict[str, Any]) -> bool:
    """Whether a call is given a static cache that does not hold its tensors yet."""
    cache = named.get("past_key_values", named.get("cache"))
    return bool(getattr(cache, "is_compileable", False)) and not getattr(cache, "is_initialized", True)
