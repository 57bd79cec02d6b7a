"""The subcommand that draws: which patches of an image a recipe keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ArgumentError, MissingDependencyError
from ..files import check_writable
from .app import Say, app
from .options import DType, Json, Model, Quiet, Stats, load, recipe_of


@app.command()
def show(
    model: Model,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Option(help="What is asked about it.")] = "What is in this image?",
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("kept.png"),
    recipe: Annotated[
        str | None, typer.Option(help="A TOML file. Default: transprune as published, scaled to the depth.")
    ] = None,
    stats: Stats = None,
    grid: Annotated[str | None, typer.Option(help="ROWSxCOLUMNS of the image's tokens, if unknown.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 20,
    dtype: DType = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ask a model about an image and draw which of its patches each layer kept. Exit code 1 where that is all."""
    from ..compiled import Compiled
    from ..recipe import Recipe
    from ..tools import kept_patches

    say = Say(as_json, quiet)
    check_writable("--out", out)
    chosen = Recipe.of(None, transprune={}) if recipe is None else recipe_of(recipe, stats)
    loaded, _ = load(say, model, None, dtype)
    picture, processor = _opened(image), _processor(model)
    batch = _asked(processor, picture, question)
    for name, given in batch.items():
        if given.is_floating_point():
            batch[name] = given.to(loaded.dtype)
    shape = kept_patches.grid_of(loaded, batch) if grid is None else _grid(grid)
    fast = Compiled(loaded, chosen, target="reference")
    with say.phase("compiling and generating"):
        answer = fast.generate(**batch, max_new_tokens=tokens, do_sample=False)
    kept = kept_patches.kept_of(loaded, batch, fast.last_call)
    kept_patches.draw(kept_patches.seen(picture, batch, processor), shape, kept).save(out, format="PNG")
    words = processor.batch_decode(answer[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    shares = {title: float(flags.float().mean()) for title, flags in kept.items()}
    say.json({"answer": words, "grid": shape, "kept": shares, "image": str(out)})
    say.results.print(f"{words}\n{fast.last_call}", markup=False)
    say.aside.print(f"Wrote {out}", markup=False)
    if min(shares.values()) == 1:
        raise typer.Exit(1)


def _opened(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("pillow", "demo", "thresher show") from error
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as reason:
        raise ArgumentError(
            "image", f"{str(path)!r} ({reason})", "an image file", "Check the path."
        ) from None


def _processor(path: str) -> Any:
    import transformers as hf

    try:
        found = hf.AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as reason:
        found, said = None, (str(reason).strip() or type(reason).__name__).splitlines()[0]
    else:
        said = f"a {type(found).__name__}, which reads no images"
    if found is None or not hasattr(found, "image_processor"):
        raise ArgumentError("model", f"{path!r} ({said})", "a directory with the processor of a model that sees",
                            "Save the model's processor into it.")  # fmt: skip
    return found


def _asked(processor: Any, picture: Any, question: str) -> dict[str, Any]:
    """A prompt with the image and the question, by the chat template where there is one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    else:
        text = f"{getattr(processor, 'image_token', '<image>')}\n{question}"
    return dict(processor(text=[text], images=[picture], return_tensors="pt"))


def _grid(given: str) -> tuple[int, int]:
    rows, _, columns = given.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ArgumentError(
            "--grid", repr(given), "two numbers, such as 24x24", "Give rows and columns of tokens."
        )
    return int(rows), int(columns)
