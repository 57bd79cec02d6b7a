"""A compiled model: what `thresher.compile` returns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from thresher.runtime.session import Counters, Session

from . import backend, generation, sessions
from .compat import isolated, room_for_graphs, uncollected
from .errors import ArgumentError, ThresherError
from .recipe import Recipe
from .records.certificate import Certificate
from .report import Report


class Compiled:
    """A compiled model. Call it as the model; it runs without recording gradients.

    Everything else (`config`, `device`, ...) is looked up on the model it was made from.
    """

    def __init__(self, model: torch.nn.Module, call: Callable[..., Any], recipe: Recipe):
        self.model, self.recipe = model, recipe
        self._call = call
        self.sessions: list[Session] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with (
            sessions.collect() as made,
            torch.no_grad(),
            unwrapped(),
            specialized_floats(),
            room_for_graphs(),
        ):
            result = self._call(*args, **kwargs)
        self.sessions += made
        return result

    @property
    def reports(self) -> list[Report]:
        """One report for each graph; a model without graph breaks has one for each kind of shape."""
        return [s.report for s in self.sessions]

    @property
    def report(self) -> Report:
        """The report of the graph in which most sites were rewritten."""
        return max(self.reports, key=lambda r: r.rewritten)

    @property
    def certificates(self) -> list[Certificate]:
        """One for each report."""
        return [s.certificate for s in self.sessions]

    @property
    def certificate(self) -> Certificate:
        """The certificate of the graph in which most sites were rewritten."""
        return max(self.sessions, key=lambda s: s.report.rewritten).certificate

    @property
    def counters(self) -> list[Counters]:
        return [s.counters for s in self.sessions]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `generate` (transformers), with each step compiled; see `generation.generate`."""
        return generation.generate(self, self.model, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def check_model(model: Any) -> None:
    """Raise unless `model` is a module in eval mode."""
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(
            "model", type(model).__name__, "a torch.nn.Module", "Use thresher.optimize for a function."
        )
    if model.training:
        raise ArgumentError(
            "model", "a model in training mode", "a model in eval mode", "Call model.eval() first."
        )


def compile_strictly(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    recipe: Recipe,
    *,
    dynamic: bool | None = None,
    mode: str | None = None,
    target: str = "inductor",
) -> Compiled:
    """Compile for one recipe, and raise where `torch.compile` would warn; see `thresher.compile` for the arguments."""
    check_model(model)
    args, kwargs = example(example_inputs)
    # a partial equals no other: Dynamo would run a second model of the class on an equal backend's graphs
    own = functools.partial(backend.thresher_backend)
    call = torch.compile(
        model,
        backend=own,
        dynamic=dynamic,
        mode=None,
        options={"recipe": recipe, "target": target, "mode": mode, "strict": True},  # type: ignore[dict-item]
        **isolated(),
    )
    compiled = Compiled(model, call, recipe)
    with uncollected():
        compiled(*args, **kwargs)
    if not compiled.sessions:
        raise ThresherError(
            f"torch.compile handed over no graph of {type(model).__name__}, so that it runs as it is. "
            "TORCH_LOGS=graph_breaks,recompiles says why."
        )
    return compiled


def example(given: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
