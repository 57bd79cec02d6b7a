"""The subcommands that write files: calibrate, quantize, compile, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
    Rows,
    Stats,
    Target,
    Task,
    blamed,
    load,
    load_with_batch,
    ranks,
    recipe_of,
)


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The statistics' file, *.safetensors.")],
    recipe: RecipeOption,
    data: Data = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches of text.")] = 8,
    rows: Rows = 8,
    longest: Longest = 128,
    task: Task = None,
    dtype: DType = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a model over batches of text and keep what the recipe's passes need to know."""
    from .. import api
    from ..tools import text

    say = Say(as_json, quiet)
    check_writable("output", output)
    chosen = recipe_of(recipe, None)
    texts = None if data is None else text.read(data)
    loaded, tokenizer = load(say, model, task, dtype)
    given = [text.batch(loaded, tokenizer, rows, longest, texts, seed) for seed in range(batches)]
    with say.phase(f"calibrating on {batches} batches"), blamed(loaded, given):
        found = api.calibrate(loaded, given, chosen)
    found.save(output)
    sites = {name: len(of_pass) for name, of_pass in found.items()}
    say.json({"path": str(output), "fingerprint": found.fingerprint, "sites": sites})
    counted = (
        ", ".join(f"{n} sites for {p}" for p, n in sites.items()) or "no pass of the recipe asked for any"
    )
    say.results.print(f"Wrote {output}: {counted}.", markup=False)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="The directory to write; a new or an empty one.")],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64, 128; -1 a row.")] = -1,
    grid: Annotated[str, typer.Option(help="integer, or nvfp4 (4.5 bits).")] = "integer",
    keep: Annotated[
        list[str] | None, typer.Option(help="A linear to leave: head, first:N, a glob. Default: head.")
    ] = None,
    data: Data = None,
    sequences: Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on.")] = 128,
    length: Annotated[int, typer.Option(min=8, help="Tokens of each window.")] = 512,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say memory, time and bytes; write nothing.")
    ] = False,
    task: Task = None,
    dtype: DType = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by RSQ and write it for transformers, vLLM and Thresher (compressed-tensors).

    Finished layers lie in OUT.layers until OUT is written: the same command goes on there after an interruption. Under
    torchrun, the processes share the work.
    """
    from thresher.passes.rsq.quantizer.files import discard

    from ..calibration_data import cut_text
    from ..files import check_folder
    from ..mapped_model import MappedModel
    from ..quantization import RSQ
    from ..quantization import quantize as run
    from ..records.quantization_report import summary
    from ..tools import models, text

    group, speaks = ranks()
    say = Say(as_json and speaks, quiet or not speaks)
    if not dry_run:
        check_folder("--out", out)
    recipe = RSQ(bits=bits, group_size=group_size, grid=grid, keep=tuple(keep or ("head",)))
    recipe.validate()
    texts = None if data is None else text.read(data)
    source, tokenizer = load(say, model, task, dtype, mapped=True)
    loaded = source.model if isinstance(source, MappedModel) else source
    length = min(length, text.room(loaded, tokenizer))
    ids = cut_text(texts if texts is not None else models.texts(), tokenizer, sequences, length, 0)
    text.check_known(loaded, ids)
    shifted = text.written(loaded, ids)
    batches: Any = ids
    if shifted is not None:
        batches = [{"input_ids": i, "decoder_input_ids": d} for i, d in zip(ids.split(4), shifted.split(4))]
    layers = out.with_name(out.name + ".layers")
    doing = "looking at" if dry_run else "quantizing on"
    with (
        say.phase(f"{doing} {len(ids)} windows of {length} tokens"),
        say.heard("thresher.quantization"),
        blamed(loaded, [{"input_ids": ids[:2]} if shifted is None else batches[0]]),
    ):
        words: dict[str, Any] = {"tokenizer": tokenizer, "portable": True, "folder": layers, "group": group}
        made: Any = (
            run(source, batches, recipe, dry_run=True, **words)
            if dry_run
            else run(source, batches, recipe, **words)
        )
    if dry_run:
        say.json({**vars(made), "peak": made.peak})
        say.results.print(str(made), markup=False, highlight=False)
    if dry_run or not speaks:
        return
    with say.phase("writing"):
        made.save_pretrained(out)
        discard(layers)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    found = made.report
    missed = {m.site: m.reason for m in found.missed}
    say.json({"path": str(out), "bytes": size, **summary(found), "notes": found.notes, "missed": missed})
    say.results.print(str(made.report), markup=False, highlight=False)
    say.results.print(f"Wrote {out}: {size / 1e6:.1f} MB.", markup=False, highlight=False)


@app.command("compile")
def compile_model(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The artifact's file.")],
    recipe: RecipeOption = "exact",
    stats: Stats = None,
    data: Data = None,
    rows: Rows = 4,
    longest: Longest = 128,
    task: Task = None,
    dtype: DType = None,
    target: Target = "inductor",
    compiled: Annotated[bool, typer.Option(help="Also store machine code for this CPU.")] = False,
    html: Html = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compile a model, verify it on a batch of text, and save it. Exit code 1 when it is outside its budget."""
    from .. import api, export
    from ..records import html_report

    say = Say(as_json, quiet)
    check_writable("output", output)
    check_writable("--html", html)
    chosen = recipe_of(recipe, stats)
    loaded, batch = load_with_batch(say, model, rows, longest, data, task, dtype)
    with blamed(loaded, [batch]):
        with say.phase("compiling and verifying"):
            made = api.compile(loaded, batch, chosen, target=target)
        with say.phase("saving"):
            export.save(made, output, example_inputs=batch, compiled=compiled, longest=max(longest, 512))
    certificate = made.certificate
    say.json({"path": str(output), "certificate": certificate.to_dict()})
    say.results.print(certificate)
    say.results.print(f"Wrote {output}", markup=False)
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
    data: Data = None,
    rows: Rows = 4,
    longest: Longest = 32,
    task: Task = None,
    dtype: DType = None,
    runtime: Annotated[str, typer.Option(help="ort, ort-cuda, tensorrt or portable.")] = "ort",
    accuracy_level: Annotated[
        int, typer.Option(min=0, max=4, help="Of low-bit products (MatMulNBits); 4 computes in int8.")
    ] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export a rewritten model to ONNX, with any number of rows and tokens, and check it against the program."""
    from .. import export

    say = Say(as_json, quiet)
    check_writable("output", output)
    chosen = recipe_of(recipe, stats)
    loaded, batch = load_with_batch(say, model, max(2, rows), longest, data, task, dtype)
    with say.phase("exporting and checking"), blamed(loaded, [batch]):
        result = export.export_onnx(
            loaded, batch, output, chosen, runtime=runtime, accuracy_level=accuracy_level
        )
    say.json(result.to_dict())
    say.results.print(str(result), markup=False, highlight=False)
