"""The `thresher` command.

Exit codes: 0 when what was asked for was done and holds; 1 when it was done and a check failed (nothing
rewritten, slower than Inductor, outside the budget); 2 for wrong input, with a message that names the fix;
3 for an error that Thresher did not expect, with its traceback; 130 when it was interrupted.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .cli_options import Html, Json, Longest, Model, RecipeOption, Rows, Stats, Target, load, recipe_of
from .errors import NothingRewrittenError, ThresherError
from .files import check_writable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Graph rewrites that take the waste out of transformer inference.")  # fmt: skip


def _out(as_json: bool, payload: Any) -> None:
    if as_json:
        from .records.certificate import plain

        print(json.dumps(plain(payload), indent=2, allow_nan=False))


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"thresher {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    rows: Annotated[int, typer.Option(min=1, help="Sentences in the batch.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each candidate.")] = 5,
    as_json: Json = False,
) -> None:
    """Compile a real encoder on a real mixed-length batch and show what was done and gained."""
    from .tools import demo as module

    result = module.run(rows, rounds, Console(stderr=as_json))
    _out(as_json, module.to_dict(result))
    if result.over_inductor <= 1:
        raise typer.Exit(1)


@app.command()
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this CPU for the cost model and keep the result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print versions, what is usable on this machine, and how to get what is missing."""
    from .tools import doctor as module

    measured = module.calibrate() if calibrate else None
    if as_json:
        _out(True, {**module.to_dict(), **({"calibrated": str(measured)} if measured else {})})
    else:
        Console().print(module.render())
        if measured:
            Console().print(f"This CPU's rates are kept in {measured}.")


@app.command()
def explain(
    model: Model,
    recipe: RecipeOption = "exact",
    stats: Stats = None,
    rows: Rows = 4,
    longest: Longest = 32,
    html: Html = None,
    text: Annotated[bool, typer.Option("--text", help="Also print the rewritten program.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do to a model, without building anything. Exit code 1 when that is nothing."""
    from . import api
    from .records import html_report

    check_writable("--html", html)
    chosen = recipe_of(recipe, stats)
    loaded, batch = load(model, rows, longest)
    found = api.explain(loaded, batch, chosen)
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
    if html is not None:
        html_report.write(html, found, title=model)
        Console(stderr=True).print(f"Wrote {html}")
    if chosen.passes and not any(r.rewritten for r in found.reports):
        raise typer.Exit(1)


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The statistics' file, *.safetensors.")],
    recipe: RecipeOption,
    batches: Annotated[int, typer.Option(min=1, help="Batches of real text.")] = 8,
    rows: Rows = 8,
    longest: Longest = 128,
    as_json: Json = False,
) -> None:
    """Run a model over batches of text and keep what the recipe's passes need to know."""
    from . import api
    from .tools import models

    check_writable("output", output)
    chosen = recipe_of(recipe, None)
    loaded, tokenizer = models.load(model)
    texts = [models.mixed_length_batch(tokenizer, rows, seed, max_len=longest) for seed in range(batches)]
    found = api.calibrate(loaded, texts, chosen)
    found.save(output)
    sites = {name: len(of_pass) for name, of_pass in found.items()}
    _out(as_json, {"path": str(output), "fingerprint": found.fingerprint, "sites": sites})
    if not as_json:
        Console().print(f"Wrote {output}: " + ", ".join(f"{n} sites for {p}" for p, n in sites.items()) + ".")


@app.command("compile")
def compile_model(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The artifact's file.")],
    recipe: RecipeOption = "exact",
    stats: Stats = None,
    rows: Rows = 4,
    longest: Longest = 128,
    target: Target = "inductor",
    compiled: Annotated[bool, typer.Option(help="Also store machine code for this CPU.")] = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Compile a model, verify it on a batch of text, and save it. Exit code 1 when it is outside its budget."""
    from . import api, export
    from .records import html_report

    check_writable("output", output)
    check_writable("--html", html)
    chosen = recipe_of(recipe, stats)
    loaded, batch = load(model, rows, longest)
    made = api.compile(loaded, batch, chosen, target=target)
    export.save(made, output, example_inputs=batch, compiled=compiled, longest=max(longest, 512))
    certificate = made.certificate
    _out(as_json, {"path": str(output), "certificate": certificate.to_dict()})
    if not as_json:
        Console().print(certificate)
        Console().print(f"Wrote {output}")
    if html is not None:
        html_report.write(html, made, title=model)
    if certificate.error is not None and not certificate.holds:
        raise typer.Exit(1)


@app.command("export")
def export_model(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The ONNX file.")],
    recipe: RecipeOption = "exact",
    stats: Stats = None,
    rows: Rows = 4,
    longest: Longest = 32,
    runtime: Annotated[str, typer.Option(help="ort, ort-cuda, tensorrt or portable.")] = "ort",
    as_json: Json = False,
) -> None:
    """Export a rewritten model to ONNX and check it against the program."""
    from . import export

    check_writable("output", output)
    chosen = recipe_of(recipe, stats)
    loaded, batch = load(model, rows, longest)
    result = export.export_onnx(loaded, batch, output, chosen, runtime=runtime)
    _out(as_json, result.to_dict())
    if not as_json:
        Console().print(str(result), markup=False, highlight=False)


@app.command()
def bench(
    model: Model,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A preset's name or a TOML file; may be repeated. Default: exact."),
    ] = None,
    stats: Stats = None,
    rows: Rows = 8,
    longest: Longest = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each.")] = 5,
    target: Target = "inductor",
    least: Annotated[
        float, typer.Option(help="Exit with code 1 when the best recipe gains less than this.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Time recipes against eager and plain Inductor on one batch of real text, in turns."""
    from .tools import bench as module

    chosen = {name: recipe_of(name, stats) for name in recipe or ["exact"]}
    loaded, batch = load(model, rows, longest)
    timed, made = module.compare(loaded, batch, chosen, target=target, rounds=rounds)
    baseline = next((t for t in timed if t.name == "inductor"), timed[0])
    gains = {t.name: baseline.seconds / t.seconds for t in timed}
    expected = {n: c.report.predicted for n, c in made.items()}
    _out(as_json, {"baseline": baseline.name, "rows": [
        {**vars(t), "gain": gains[t.name], "expected": expected.get(t.name)} for t in timed
    ]})  # fmt: skip
    if not as_json:
        title = f"{model}, {rows} rows up to {longest} tokens"
        Console().print(module.table(title, timed, gains, expected, baseline.name))
    if max(gains[n] for n in made) < least:
        raise typer.Exit(1)


@app.command()
def report(
    artifact: Annotated[Path, typer.Argument(help="A file that `thresher compile` wrote.")],
    as_json: Json = False,
) -> None:
    """Show the certificate in a saved artifact. Exit code 1 when it was measured outside its budget."""
    from thresher.runtime.artifact.file import read_manifest

    from .records.certificate import Certificate

    found = read_manifest(artifact).get("certificate")
    if found is None:
        raise ThresherError(
            f"{artifact} holds no certificate: it was saved from a Program, not from thresher.compile."
        )
    certificate = Certificate.from_dict(found)
    _out(as_json, certificate.to_dict())
    if not as_json:
        Console().print(certificate)
    if certificate.error is not None and not certificate.holds:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a ThresherError is a message and exit code 2; a defect is never exit code 1, a failed check's."""
    try:
        app()
    except NothingRewrittenError as error:  # asked for rightly, and a check failed
        Console(stderr=True).print("[red]failed:[/red]", escape(str(error)))
        raise SystemExit(1) from None
    except ThresherError as error:
        console = Console(stderr=True)
        console.print("[red]error:[/red]", escape(str(error)))  # escaped: `thresher[demo]` is no colour
        raise SystemExit(2) from None
    except Exception:
        traceback.print_exc()
        print("Thresher did not expect this error: please report it with the lines above.", file=sys.stderr)
        raise SystemExit(3) from None
