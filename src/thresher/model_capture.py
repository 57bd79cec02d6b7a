"""From a model and example inputs to its graphs: what compiling, explaining, calibrating, quantizing and exporting share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thresher.passes.calibrate import Calibration

from .compat import isolated, settings, without_fake_mode
from .errors import ArgumentError, CaptureError, ThresherError
from .graph import autocast, capture
from .graph.program import Program
from .tractable import parts_of, tractable


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
    return settings(torch._dynamo.config, specialize_float=True)


@contextlib.contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Within the context a transformers model returns no cache: its results would be part of the graph."""
    parts = (
        getattr(module, "config", None) for module in model.modules()
    )  # an encoder-decoder's have their own
    configs = {id(c): c for c in parts if c is not None and getattr(c, "use_cache", None)}
    before = {number: config.use_cache for number, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for number, config in configs.items():
            config.use_cache = before[number]


def shown_to(
    backend: Callable[..., Any], model: torch.nn.Module, dynamic: bool | None = None, whole: bool = False
) -> Callable[..., Any]:
    """The model, to be called as it is: Dynamo hands each graph it meets to `backend`, apart from other calls' graphs.

    whole: Dynamo's own error where that is more than one graph.
    It records no gradients. Raises what `backend` raises, where that is an error of ours, as it is.
    """
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=whole, **isolated())
    parts = parts_of(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), unwrapped(), specialized_floats(), tractable(parts):
            return compiled(*args, **kwargs)

    return call


class _Seen(Exception):
    """The graph was seen, and need not run."""


def graphs(model: torch.nn.Module, given: Mapping[str, Any]) -> list[Program | None]:
    """The graphs of a model called with `given`, at any sizes; None for one of sizes only, and for any behind the first. A
    single one is not run: that would read every weight."""
    programs: list[Program | None] = []

    def see(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        apart = bool(programs) or not any(isinstance(x, torch.Tensor) for x in inputs)
        programs.append(None if apart else capture.from_dynamo(gm, inputs)[0])

    def look(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        see(gm, inputs)

        def stop(*_: Any) -> Any:
            raise _Seen

        return stop

    def count(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        see(gm, inputs)
        return gm.forward

    try:
        shown_to(look, model, dynamic=True, whole=True)(**given)
    except _Seen:
        return programs
    except torch._dynamo.exc.TorchDynamoException:
        programs.clear()
    shown_to(count, model, dynamic=True)(**given)
    return programs


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


def watching(calibration: Calibration) -> Callable[..., Any]:
    """A backend for torch.compile that runs graphs as they are and shows them to a calibration."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        program, roles = capture.from_dynamo(gm, example_inputs)
        program.mask_name = calibration.recipe.mask_name
        with without_fake_mode(), autocast.suspended():
            watched = calibration.watch(program)

        def run(*args: Any) -> Any:
            inputs = [a for a, role in zip(args, roles) if role.startswith("input:")]
            real = program.real_tokens(inputs)
            with autocast.suspended():
                return program.settle(calibration.run(watched, inputs, real), inputs)

        return run

    return backend
