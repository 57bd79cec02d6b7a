"""`generate` of transformers, whose steps call the model: here they call the compiled one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import ArgumentError
from .notices import warn

EAGER_PREFILL = (
    "generate makes its static cache during the prefill, which transformers does not compile, and this prefill is not one "
    "whole prompt of a decoder with attention in every layer and a mask of one row a sequence: that call runs as the model "
    "was written, padded. Later steps are compiled. Leave cache_implementation out to have the prefill compiled."
)


def generate(compiled: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run `model.generate` with the compiled model in the model's place.

    A static cache is empty memory when the prefill begins. The prefill then runs compiled over a cache that it hands back,
    in which tokens may be packed, and what it holds moves into the static one.

    While it runs, other threads that call the model get the compiled one too.

    Raises ArgumentError for a model without `generate`, and for a `compile_config`.
    """
    if not callable(getattr(model, "generate", None)):
        raise ArgumentError(
            "model",
            f"a {type(model).__name__}, which has no generate",
            "a model with generate, such as transformers' ...ForCausalLM",
            "Call the compiled model step by step.",
        )
    if kwargs.get("compile_config") is not None:
        raise ArgumentError("compile_config", type(kwargs["compile_config"]).__name__, "None: this model is compiled",
                            "Leave it out, or call generate of the model itself.")  # fmt: skip
    own = model.__dict__.get("forward")  # a hook, such as accelerate's
    written: Callable[..., Any] = model.forward
    prepare_inputs: Callable[..., Any] = model.prepare_inputs_for_generation  # type: ignore[assignment]
    # of the call that is prepared, before transformers widens it to the cache
    mask: torch.Tensor | None = None

    @functools.wraps(prepare_inputs)
    def prepare(*inputs: Any, **named: Any) -> Any:
        nonlocal mask
        mask = named.get("attention_mask")
        return prepare_inputs(*inputs, **named)

    @functools.wraps(written)
    def forward(*inputs: Any, **named: Any) -> Any:
        name = "cache" if "cache" in named else "past_key_values"
        static: Any = named.get(name)
        if not _is_empty_and_static(static):
            with _instead(model, "forward", own):  # what is compiled is the model's own
                return compiled(*inputs, **named)
        from transformers.cache_utils import DynamicCache, StaticLayer

        layers = getattr(static, "layers", ())  # an encoder-decoder's cache has none of its own
        keys_and_values = bool(layers) and all(isinstance(layer, StaticLayer) for layer in layers)
        if inputs or not keys_and_values or not _one_prompt(named, mask):
            warn(EAGER_PREFILL)
            return written(*inputs, **named)
        given = {**named, name: DynamicCache(), "attention_mask": mask}
        with _instead(model, "forward", own):
            out = compiled(**given)
        for index, layer in enumerate(out[name].layers):
            static.update(layer.keys, layer.values, index)
        out[name] = static
        return out

    with _instead(model, "forward", forward), _instead(model, "prepare_inputs_for_generation", prepare):
        # on a GPU, transformers would have Inductor compile a decode step that calls the compiled model
        return model.generate(*args, **{"disable_compile": True, **kwargs})  # type: ignore[operator]


@contextlib.contextmanager
def _instead(model: torch.nn.Module, name: str, function: Any) -> Iterator[None]:
    """Give one model another method for a while; None gives it the one of its class."""
    before = model.__dict__.pop(name, None)
    if function is not None:
        model.__dict__[name] = function
    try:
        yield
    finally:
        model.__dict__.pop(name, None)
        if before is not None:
            model.__dict__[name] = before


def _is_empty_and_static(cache: Any) -> bool:
    """Whether a cache has a fixed size and does not hold its tensors yet; a decoder's own, where it has two."""
    cache = getattr(cache, "self_attention_cache", cache)
    return bool(getattr(cache, "is_compileable", False)) and not getattr(cache, "is_initialized", True)


def _one_prompt(named: dict[str, Any], mask: torch.Tensor | None) -> bool:
    """Whether a call is a whole prompt, with a mask [rows, tokens] or none."""
    tokens = named.get("input_ids")
    if tokens is None:
        tokens = named.get("inputs_embeds")
    return tokens is not None and (mask is None or mask.shape == tokens.shape[:2])
