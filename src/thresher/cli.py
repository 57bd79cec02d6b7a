"""The `thresher` command."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import ThresherError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Graph rewrites that take the waste out of transformer inference.")  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _out(as_json: bool, payload: Any) -> None:
    if as_json:
        print(json.dumps(payload, indent=2))


@app.command()
def demo(
    rows: Annotated[int, typer.Option(help="Sentences in the batch.")] = 16,
    rounds: Annotated[int, typer.Option(help="Timed turns of each candidate.")] = 5,
    as_json: Json = False,
) -> None:
    """Compile a real encoder on a real mixed-length batch and show what was done and gained."""
    from . import demo as module

    result = module.run(rows, rounds, Console(stderr=as_json))
    _out(as_json, module.to_dict(result))
    if result.over_inductor <= 1:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Print versions, what is usable on this machine, and how to get what is missing."""
    from . import doctor as module

    if as_json:
        _out(True, module.to_dict())
    else:
        Console().print(module.render())


@app.command()
def explain(
    model: Annotated[
        str, typer.Argument(help="minilm, smollm2, or the path of a Hugging Face model directory.")
    ],
    recipe: Annotated[str, typer.Option(help="A preset's name or a TOML file.")] = "exact",
    text: Annotated[bool, typer.Option("--text", help="Also print the rewritten program.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do to a model, without building anything."""
    from . import api, models

    loaded, tokenizer = models.load(model)
    batch = models.mixed_length_batch(tokenizer, 4, max_len=32)
    found = api.explain(loaded, batch, recipe)
    _out(as_json, {"reports": [r.to_dict() for r in found.reports], "refused": found.refused})
    if not as_json:
        console = Console()
        for report in found.reports:
            console.print(report)
        for reason in found.refused:
            console.print(f"not captured: {reason}")
        if text:
            for program in found.after:
                print(program.text())


def main() -> None:
    """Entry point: a ThresherError is a message and exit code 2, not a traceback."""
    try:
        app()
    except ThresherError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}")
        raise SystemExit(2) from None
