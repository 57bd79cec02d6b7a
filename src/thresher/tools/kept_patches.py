"""An image with the patches over it that token pruning kept: what `thresher show` writes.

out = fast.generate(**batch, max_new_tokens=20)
draw(image, grid_of(model, batch), kept_of(model, batch, fast.last_call)).save("kept.png")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch

from ..errors import ArgumentError, MissingDependencyError

Grid = tuple[int, int]
_TITLE, _GAP, _LEAST = 18, 8, 224  # pixels: above a panel, between panels, and of a panel's shorter side


def image_tokens(model: Any, batch: Mapping[str, torch.Tensor], row: int = 0) -> torch.Tensor:
    """int64 [n]: the columns of a row's image tokens. ArgumentError where the model names none, or the row has none."""
    config = model.config
    mark = next(
        (m for n in ("image_token_id", "image_token_index") if (m := getattr(config, n, None)) is not None),
        None,
    )
    columns = (batch["input_ids"][row] == (-1 if mark is None else mark)).nonzero().flatten()
    if mark is None or not len(columns):
        given = f"a {type(model).__name__}'s batch whose row {row} holds no image tokens"
        raise ArgumentError("batch", given, "a prompt with an image, its tokens marked by config.image_token_id",
                            "Make it with the model's processor, from text with the image's placeholder.")  # fmt: skip
    return columns


def grid_of(model: Any, batch: Mapping[str, torch.Tensor], row: int = 0) -> Grid:
    """(rows, columns) of the tokens of the one image of a row, as the model's processor laid them out.

    From image_grid_thw (Qwen's models), from image_sizes (Pixtral's tower), else a square. Raises ArgumentError where the
    tokens are none of these, such as tiles beside an overview.
    """
    count = len(image_tokens(model, batch, row))
    vision = getattr(model.config, "vision_config", None)
    found: list[Grid] = []
    if "image_grid_thw" in batch:
        frames, high, wide = (int(n) for n in batch["image_grid_thw"][row])
        merge = getattr(vision, "spatial_merge_size", 1)
        found.append((frames * high // merge, wide // merge))
    if "image_sizes" in batch:
        patch = getattr(vision, "patch_size", 1) * getattr(model.config, "spatial_merge_size", 1)
        high, wide = (int(n) // patch for n in batch["image_sizes"][row])
        found.append((high, wide))
    found.append((isqrt(count), isqrt(count)))
    for grid in found:
        if grid[0] * grid[1] == count:
            return grid
    raise ArgumentError(
        "grid", f"{count} image tokens, which are no grid that is known", "rows and columns of one image's tokens",
        "Give them (thresher show --grid 24x24); an image that is cut into tiles is not drawn.")  # fmt: skip


def kept_of(
    model: Any, batch: Mapping[str, torch.Tensor], call: Any, row: int = 0
) -> dict[str, torch.Tensor]:
    """By title, bool [image tokens]: what was kept, once for layers in a line that keep the same, counted from one.

    call: `last_call`.
    """
    columns = image_tokens(model, batch, row)
    found: list[tuple[int, int, torch.Tensor]] = []  # first layer, last layer, flags
    for number, at in enumerate(call.at, start=1):
        kept = torch.isin(columns, at[row].to(columns.device)).cpu()
        if found and torch.equal(kept, found[-1][2]):
            found[-1] = (found[-1][0], number, kept)
        else:
            found.append((number, number, kept))
    return {f"{_layers(a, b)}: {kept.float().mean():.0%} kept": kept for a, b, kept in found}


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def draw(image: Any, grid: Grid, kept: Mapping[str, Sequence[bool] | torch.Tensor]) -> Any:
    """A PIL image: `image` once for each entry of `kept`, patches left out dark, with its title above.

    image: a PIL image as the model saw it, so that the grid lies over all of it. grid: rows and columns of its tokens.
    kept: by title, a boolean for each token, row by row.
    """
    pil = _pil()
    rows, columns = grid
    for title, flags in kept.items():
        if len(flags) != rows * columns:
            raise ArgumentError("kept", f"{len(flags)} tokens for {title!r}", f"{rows} times {columns}",
                                "Give a boolean for each token of the image.")  # fmt: skip
    image = image.convert("RGB")
    scale = max(1, -(-_LEAST // min(image.size)))
    size = tuple(n * scale for n in image.size)
    image = image.resize(size)
    dark = pil["Image"].blend(image.convert("L").convert("RGB"), pil["Image"].new("RGB", size), 0.75)
    sheet = pil["Image"].new("RGB", (len(kept) * (size[0] + _GAP) - _GAP, size[1] + _TITLE), "white")
    write = pil["ImageDraw"].Draw(sheet)
    for number, (title, flags) in enumerate(kept.items()):
        panel = dark.copy()
        for place in (i for i, stays in enumerate(flags) if stays):
            at = _box(place, grid, size)
            panel.paste(image.crop(at), at)
        left = number * (size[0] + _GAP)
        sheet.paste(panel, (left, _TITLE))
        write.text((left, 2), title, fill="black")
    return sheet


def seen(image: Any, batch: Mapping[str, torch.Tensor], processor: Any, row: int = 0) -> Any:
    """The image as the model saw it: out of its pixel values where these are one picture, else as it was given.

    A processor may cut an image's sides off before it makes patches, and then the grid lies over the rest.
    """
    pixels, how = batch.get("pixel_values"), getattr(processor, "image_processor", processor)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or pixels.shape[1] != 3:
        return image
    mean, std = (torch.tensor(getattr(how, n, d) or d).view(3, 1, 1)
                 for n, d in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3)))  # fmt: skip
    shown = ((pixels[row].float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return _pil()["Image"].fromarray(shown.permute(1, 2, 0).contiguous().numpy())


def _box(place: int, grid: Grid, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a token's patch in an image of `size`."""
    y, x = divmod(place, grid[1])
    return (x * size[0] // grid[1], y * size[1] // grid[0],
            (x + 1) * size[0] // grid[1], (y + 1) * size[1] // grid[0])  # fmt: skip


def _pil() -> dict[str, Any]:
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingDependencyError("pillow", "demo", "Drawing an image's kept patches") from error
    return {"Image": Image, "ImageDraw": ImageDraw}
