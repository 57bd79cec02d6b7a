"""The options that subcommands of `thresher` share, and the recipe, model and text that they stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ThresherError
from .app import Say

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors, and JSON if asked.")]
Model = Annotated[str, typer.Argument(help="minilm, smollm2, or the path of a Hugging Face model directory.")]
RecipeOption = Annotated[str, typer.Option(help="A preset's name or a TOML file.")]
Stats = Annotated[Path | None, typer.Option(help="Statistics that `thresher calibrate` wrote.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of text in the batch.")]
Longest = Annotated[int, typer.Option(min=4, help="Longest row in tokens.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed turns of each candidate.")]
Target = Annotated[str, typer.Option(help="inductor or reference.")]
Html = Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Your text: .txt (one a line), .jsonl, .json, or a folder. Default: Python's reference."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(help="The model's head, as pipelines call it. Default: the one it was saved with."),
]
DType = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Default: the files' own.")
]


def recipe_of(name: str, stats: Path | None) -> Any:
    """The recipe of a preset's name or a TOML file, with the statistics of a file."""
    from thresher.passes.calibrate import Statistics

    from .. import backend  # registers the passes
    from ..recipe import Recipe

    assert backend
    if stats is not None:
        Statistics.load(stats)  # a wrong file is wrong input, not a graph that could not be captured
    return Recipe.of(name, **({"stats": str(stats)} if stats is not None else {}))


def load(say: Say, model: str, task: str | None, dtype: str | None, mapped: bool = False) -> tuple[Any, Any]:
    """The model and its tokenizer. mapped: a MappedModel, where its weights can stay in their files."""
    from ..errors import unknown_key
    from ..tools import models
    from ..tools.directory import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise unknown_key("--dtype", dtype, DTYPES)
    with say.phase("loading the model"), _still():
        take = models.mapped if mapped else models.load
        return take(model, task, DTYPES[dtype] if dtype is not None else None)


def ranks() -> tuple[Any, bool]:
    """(the process group of those that torchrun started, which share the work; whether this one speaks for them). None for
    a process alone."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        return None, True
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.group.WORLD, dist.get_rank() == 0


def load_with_batch(
    say: Say, model: str, rows: int, longest: int, data: Path | None, task: str | None, dtype: str | None
) -> tuple[Any, dict[str, Any]]:
    """The model, and a batch of text for it: its inputs by name."""
    from ..tools import text

    texts = (
        None if data is None else text.read(data)
    )  # first: a wrong file is said before the model is loaded
    loaded, tokenizer = load(say, model, task, dtype)
    return loaded, text.batch(loaded, tokenizer, rows, longest, texts)


@contextlib.contextmanager
def blamed(model: Any, batches: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Around work on a model: where that breaks and the model itself cannot be called so either, it is that error."""
    try:
        yield
    except ThresherError:
        raise
    except Exception as error:
        import torch

        try:
            with torch.no_grad():
                model(**batches[0])
        except Exception as own:
            said = (str(own).strip() or type(own).__name__).splitlines()[0]
            raise ThresherError(
                f"{type(model).__name__} itself cannot be called with {', '.join(batches[0])} of this text: {said} "
                "Check the model with the library that saved it."
            ) from None
        raise error


@contextlib.contextmanager
def _still() -> Iterator[None]:
    """Without transformers' own bars and advice, which say what the phase says."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        yield
        return
    from transformers.utils import logging as words

    level, bars = words.get_verbosity(), words.is_progress_bar_enabled()
    words.set_verbosity_error()
    words.disable_progress_bar()
    try:
        yield
    finally:
        words.set_verbosity(level)
        if bars:
            words.enable_progress_bar()
