"""Compiling that raises where `torch.compile` would warn, and what it checks before and after."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from thresher.passes.keep import unnamed

from . import given_tokens, waiting
from .compat import own_symbols, uncollected
from .compiled import Compiled
from .errors import ArgumentError, NothingRewrittenError, ThresherError, did_you_mean
from .model_capture import example
from .notices import ThresherWarning, disabled
from .recipe import PassConfig, Recipe
from .undone import rewrote_nothing


def check_model(model: Any) -> None:
    """Raise unless `model` is a module in eval mode that is not compiled yet."""
    check_plain(model)
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(
            "model", type(model).__name__, "a torch.nn.Module", "Use thresher.optimize for a function."
        )
    if model.training:
        raise ArgumentError(
            "model", "a model in training mode", "a model in eval mode", "Call model.eval() first."
        )


def check_plain(model: Any) -> None:
    """Raise for a compiled model where the model itself is wanted."""
    if isinstance(model, Compiled):
        raise ArgumentError(
            "model", "what thresher.compile made", "the model itself", "Pass the compiled model's .model."
        )


def compile_strictly(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    recipe: Recipe,
    *,
    dynamic: bool | None = None,
    mode: str | None = None,
    target: str = "inductor",
    target_options: Mapping[str, Any] | None = None,
    may_do_nothing: bool = False,
) -> Compiled:
    """Compile for one recipe, and raise where `torch.compile` would warn; see `thresher.compile` for the arguments.

    may_do_nothing: a model in which the recipe rewrites nothing is a result like others, with a warning.
    """
    check_model(model)
    args, kwargs = example(example_inputs)
    compiled = Compiled(
        model, recipe, dynamic=dynamic, mode=mode, target=target, target_options=target_options
    )
    if disabled():
        return compiled
    square = dynamic is not False and any(map(_square, tree_leaves((args, kwargs))))
    with uncollected(), warnings.catch_warnings(), own_symbols() if square else contextlib.nullcontext():
        if not may_do_nothing:  # raised below
            warnings.filterwarnings("ignore", "thresher rewrote nothing", ThresherWarning)
        # its results are nobody's, and who generates may never run this program again
        how = waiting.LAZY if callable(getattr(model, "generate", None)) else waiting.NO
        with given_tokens.reading_kept(), waiting.at_once(how):
            compiled(*args, **kwargs)
    if not compiled.sessions:
        raise ThresherError(
            f"torch.compile handed over no graph of {type(model).__name__}, so that it runs as it is. "
            "TORCH_LOGS=graph_breaks,recompiles says why."
        )
    _check_done(compiled, may_do_nothing)
    return compiled


def _square(given: Any) -> bool:
    """Whether a batch has as many rows as columns, which torch would take for one size that varies."""
    return isinstance(given, torch.Tensor) and given.dim() > 1 and given.shape[0] == given.shape[1] > 1


def _check_done(compiled: Compiled, may_do_nothing: bool) -> None:
    """Raise where the model is what it was, or where an option names what it does not have."""
    recipe, reports = compiled.recipe, compiled.reports
    for config in recipe.passes:
        notes = [[n for p in r.passes if p.name == config.name for n in p.notes] for r in reports]
        words = getattr(config, "keep", ())
        for word in words if isinstance(words, tuple) else ():
            if all(unnamed(word) in said for said in notes):
                raise names_nothing(config, word, compiled.model)
    undone = rewrote_nothing(reports)
    if undone is not None and recipe.fuel != 0 and not may_do_nothing:
        count, cut = len(compiled.sessions), ""
        if count > 1:
            cut = (
                f"torch.compile cut the model into {count} graphs, and what a pass looks for may lie on both sides of a "
                "cut; TORCH_LOGS=graph_breaks names the places. "
            )
        raise NothingRewrittenError(
            f"The recipe rewrote nothing in {type(compiled.model).__name__}. {undone} {cut}"
            'thresher.explain shows every site; the recipe "none" compiles the model as it is.'
        )


def names_nothing(config: PassConfig, word: str, model: torch.nn.Module) -> ArgumentError:
    """The error for a word of a pass's `keep` that names no linear of a model."""
    known = ["head", "router", "embedding", "first", "last", *(n for n, _ in model.named_modules() if n)]
    return ArgumentError(
        f"{config.name} option keep",
        f"{word!r}, which names no linear of this model",
        "'head', 'embedding', 'first:N', 'last:N', or a linear's name, also with *",
        f"Correct it, or leave it out.{did_you_mean(word, known)}",
    )
