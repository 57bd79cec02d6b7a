"""The subcommands that make nothing: demo, doctor, explain, bench, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ThresherError
from ..files import check_writable
from .app import Say, app
from .options import (
    Data,
    DType,
    Html,
    Json,
    Longest,
    Model,
    Quiet,
    RecipeOption,
    Rounds,
    Rows,
    Stats,
    Target,
    Task,
    blamed,
    load_with_batch,
    recipe_of,
)


@app.command()
def demo(
    rows: Annotated[int, typer.Option(min=1, help="Sentences in the batch.")] = 16,
    rounds: Rounds = 5,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compile a real encoder on a real mixed-length batch and show what was done and gained."""
    from ..tools import demo as module

    say = Say(as_json, quiet)
    result = module.run(rows, rounds, say.aside if as_json else say.results)
    say.json(module.to_dict(result))
    if result.over_inductor <= 1:
        raise typer.Exit(1)


@app.command()
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this CPU for the cost model and keep the result.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print versions, what is usable on this machine, and how to get what is missing."""
    from ..tools import doctor as module

    say = Say(as_json, quiet)
    measured = None
    if calibrate:
        with say.phase("measuring this CPU"):
            measured = module.calibrate()
    if as_json:
        say.json({**module.to_dict(), **({"calibrated": str(measured)} if measured else {})})
    else:
        say.results.print(module.render())
        if measured:
            say.results.print(f"This CPU's rates are kept in {measured}.")


@app.command()
def explain(
    model: Model,
    recipe: RecipeOption = "exact",
    stats: Stats = None,
    data: Data = None,
    rows: Rows = 4,
    longest: Longest = 32,
    task: Task = None,
    dtype: DType = None,
    html: Html = None,
    text: Annotated[bool, typer.Option("--text", help="Also print the rewritten program.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do to a model, without building anything. Exit code 1 when that is nothing."""
    from .. import api
    from ..records import html_report

    say = Say(as_json, quiet)
    check_writable("--html", html)
    chosen = recipe_of(recipe, stats)
    loaded, batch = load_with_batch(say, model, rows, longest, data, task, dtype)
    with say.phase("capturing and rewriting"), blamed(loaded, [batch]):
        found = api.explain(loaded, batch, chosen)
    say.json({"reports": [r.to_dict() for r in found.reports], "refused": found.refused})
    for report in found.reports:
        say.results.print(report)
    for reason in found.refused:
        say.results.print(f"not captured: {reason}", markup=False)
    if text and not as_json:
        for program in found.after:
            print(program.text())
    if html is not None:
        html_report.write(html, found, title=model)
        say.aside.print(f"Wrote {html}")
    if chosen.passes and not any(r.rewritten for r in found.reports):
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A preset's name or a TOML file; may be repeated. Default: exact."),
    ] = None,
    stats: Stats = None,
    data: Data = None,
    rows: Rows = 8,
    longest: Longest = 128,
    task: Task = None,
    dtype: DType = None,
    rounds: Rounds = 5,
    target: Target = "inductor",
    least: Annotated[
        float, typer.Option(help="Exit with code 1 when the best recipe gains less than this.")
    ] = 0.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time recipes against eager and plain Inductor on one batch of real text, in turns."""
    from ..tools import bench as module

    say = Say(as_json, quiet)
    chosen = {name: recipe_of(name, stats) for name in recipe or ["exact"]}
    loaded, batch = load_with_batch(say, model, rows, longest, data, task, dtype)
    with say.phase("compiling and timing"), blamed(loaded, [batch]):
        timed, made = module.compare(loaded, batch, chosen, target=target, rounds=rounds)
    baseline = next((t for t in timed if t.name == "inductor"), timed[0])
    gains = {t.name: baseline.seconds / t.seconds for t in timed}
    expected = {n: c.report.predicted for n, c in made.items()}
    say.json({"baseline": baseline.name, "rows": [
        {**vars(t), "gain": gains[t.name], "expected": expected.get(t.name)} for t in timed
    ]})  # fmt: skip
    count, width = next(iter(batch.values())).shape[:2]
    title = f"{model}, {count} rows up to {width} tokens"
    say.results.print(module.table(title, timed, gains, expected, baseline.name))
    if max(gains[n] for n in made) < least:
        raise typer.Exit(1)


@app.command()
def report(
    artifact: Annotated[Path, typer.Argument(help="A file that `thresher compile` wrote.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the certificate in a saved artifact. Exit code 1 when it was measured outside its budget."""
    from thresher.runtime.artifact.file import read_manifest

    from ..records.certificate import Certificate

    say = Say(as_json, quiet)
    found = read_manifest(artifact).get("certificate")
    if found is None:
        raise ThresherError(
            f"{artifact} holds no certificate: it was saved from a Program, not from thresher.compile."
        )
    certificate = Certificate.from_dict(found)
    say.json(certificate.to_dict())
    say.results.print(certificate)
    if certificate.error is not None and not certificate.holds:
        raise typer.Exit(1)
