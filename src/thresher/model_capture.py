"""From a model and example inputs to its graphs: what compiling, explaining, calibrating, quantizing and exporting share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .compat import isolated
from .errors import ArgumentError, CaptureError, ThresherError
from .graph import capture
from .graph.program import Program


def example(given: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (positional, keyword) arguments; raises ArgumentError for anything but a dict or a tuple."""
    if isinstance(given, Mapping) or hasattr(given, "keys"):
        return (), dict(given)  # a tokenizer's BatchEncoding is a mapping by behaviour only
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    raise ArgumentError("example_inputs", type(given).__name__, "a dict of keyword arguments or a tuple of positional ones",
                        "Pass what you would call the model with.")  # fmt: skip


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Dynamo wraps what a backend raises; give the user our own error."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as wrapped:
        inner = wrapped.inner_exception
        raise inner.with_traceback(None) from None if isinstance(inner, ThresherError) else wrapped


def specialized_floats() -> Any:
    """Norm epsilons and attention scales are constants, also with dynamic=True."""
    return torch._dynamo.config.patch(specialize_float=True)


@contextlib.contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Within the context a transformers model returns no cache: its results would be part of the graph."""
    parts = (
        getattr(module, "config", None) for module in model.modules()
    )  # an encoder-decoder's have their own
    configs = {id(c): c for c in parts if getattr(c, "use_cache", None)}
    before = {number: config.use_cache for number, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for number, config in configs.items():
            config.use_cache = before[number]


def shown_to(
    backend: Callable[..., Any], model: torch.nn.Module, dynamic: bool | None = None
) -> Callable[..., Any]:
    """The model, to be called as it is: Dynamo hands each graph it meets to `backend`, apart from other calls' graphs.

    It records no gradients. Raises what `backend` raises, where that is an error of ours, as it is.
    """
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, **isolated())

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), unwrapped(), specialized_floats():
            return compiled(*args, **kwargs)

    return call


def exported(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None
) -> tuple[Program, torch.export.ExportedProgram]:
    """The model by way of torch.export, as a Program and as torch has it; raises CaptureError for one it cannot take."""
    try:
        with torch.no_grad():
            found = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as reason:
        raise CaptureError(
            f"torch.export cannot capture the model: {str(reason).splitlines()[0]}"
        ) from reason
    return capture.from_export(found), found
