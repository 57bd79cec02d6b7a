"""The options that subcommands of `thresher` share, and the recipe, model and text that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Model = Annotated[str, typer.Argument(help="minilm, smollm2, or the path of a Hugging Face model directory.")]
RecipeOption = Annotated[str, typer.Option(help="A preset's name or a TOML file.")]
Stats = Annotated[Path | None, typer.Option(help="Statistics that `thresher calibrate` wrote.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of real text in the batch.")]
Longest = Annotated[int, typer.Option(min=4, help="Longest row in tokens.")]
Target = Annotated[str, typer.Option(help="inductor or reference.")]
Html = Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")]


def recipe_of(name: str, stats: Path | None) -> Any:
    """The recipe of a preset's name or a TOML file, with the statistics of a file."""
    from thresher.passes.calibrate import Statistics

    from . import backend  # registers the passes
    from .recipe import Recipe

    assert backend
    if stats is not None:
        Statistics.load(stats)  # a wrong file is wrong input, not a graph that could not be captured
    return Recipe.of(name, **({"stats": str(stats)} if stats is not None else {}))


def load(model: str, rows: int, longest: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """The model, and a batch of real text for it: its inputs by name."""
    from .tools import models

    loaded, tokenizer = models.load(model)
    return loaded, models.mixed_length_batch(tokenizer, rows, seed, max_len=longest)
