"""Images and questions, drawn from scikit-learn's 8x8 digits. Nothing is downloaded.

An image is 40x40 RGB: a 5x5 grid of 8x8 cells holding 8 digits of 8 different colours, 8 grey
digits, 5 coloured cells whose pixels were shuffled, and 4 blank ones, under noise. Patches of 4x4
make 100 image tokens, four to a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

GRID, CELL, PATCH = 5, 8, 4
SIDE = GRID * CELL
PATCHES = (SIDE // PATCH) ** 2
COLOURS, DIGITS = 8, 10
TRAIN_DIGITS = 1400  # of 1797; the rest is only ever tested on
_GREY, _SCRAMBLED = 8, 5
_NOISE = 0.08

_PALETTE = torch.tensor(
    [
        [1.0, 0.1, 0.1],
        [0.1, 0.9, 0.1],
        [0.2, 0.3, 1.0],
        [1.0, 1.0, 0.1],
        [1.0, 0.1, 1.0],
        [0.1, 1.0, 1.0],
        [1.0, 0.5, 0.0],
        [0.5, 0.1, 0.9],
        [0.6, 0.6, 0.6],  # grey, no colour of the game
    ]
)

# The vocabulary: digits stand at their own value.
COLOUR0 = DIGITS
DIRECT, CHAIN, ASSISTANT, IMAGE, PAD = range(COLOUR0 + COLOURS, COLOUR0 + COLOURS + 5)
VOCABULARY = PAD + 1
TURN = 4  # mode, assistant, colour, answer
QUESTION = TURN - 1


@dataclass(frozen=True)
class Scene:
    """A batch of images and what is in them.

    images: float [B, 3, 40, 40]
    digit_of: int64 [B, 8], the digit of each colour
    cell_of: int64 [B, 8], the grid cell (row-major) of each colour
    digit_in, colour_in: int64 [B, 25], what each cell shows, with 10 and 8 for "none"
    """

    images: torch.Tensor
    digit_of: torch.Tensor
    cell_of: torch.Tensor
    digit_in: torch.Tensor
    colour_in: torch.Tensor


@cache
def _digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(7))
    order = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    return torch.tensor(bunch.images, dtype=torch.float32)[order] / 16, torch.tensor(bunch.target)[order]


def draw(batch: int, split: str, make: torch.Generator) -> Scene:
    """`batch` random images of the `train` or `test` split."""
    pictures, labels = _digits(split)
    cells, shown = GRID * GRID, COLOURS + _GREY + _SCRAMBLED
    place = torch.rand(batch, cells, generator=make).argsort(1)[:, :shown]
    choice = torch.randint(len(labels), (batch, shown), generator=make)
    glyphs = pictures[choice].flatten(2)
    shuffle = torch.rand(batch, _SCRAMBLED, CELL * CELL, generator=make).argsort(2)
    glyphs[:, COLOURS + _GREY :] = glyphs[:, COLOURS + _GREY :].gather(2, shuffle)
    palette = torch.cat(
        [
            torch.arange(COLOURS).expand(batch, -1),
            torch.full((batch, _GREY), COLOURS),
            torch.randint(COLOURS, (batch, _SCRAMBLED), generator=make),
        ],
        dim=1,
    )
    light = 0.7 + 0.3 * torch.rand(batch, shown, 1, 1, generator=make)
    painted = _PALETTE[palette][..., None] * glyphs[:, :, None] * light  # [B, shown, 3, 64]
    canvas = torch.zeros(batch, cells, 3, CELL * CELL)
    canvas.scatter_(1, place[..., None, None].expand_as(painted), painted)
    images = canvas.view(batch, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    images = images.reshape(batch, 3, SIDE, SIDE)
    images = images + _NOISE * torch.randn(images.shape, generator=make)
    digit_in = torch.full((batch, cells), DIGITS)
    digit_in.scatter_(1, place[:, : COLOURS + _GREY], labels[choice[:, : COLOURS + _GREY]])
    colour_in = torch.full((batch, cells), COLOURS)
    colour_in.scatter_(1, place[:, :COLOURS], palette[:, :COLOURS])
    return Scene(images, labels[choice[:, :COLOURS]], place[:, :COLOURS], digit_in, colour_in)


def answer(scene: Scene, mode: torch.Tensor, subject: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers, and the cells one must look at.

    mode: int64 [B, turns], `DIRECT` or `CHAIN`; subject: int64 [B, turns], the colour asked about.
    Returns digits [B, turns] and cells [B, turns, 2] (a direct question repeats its cell).
    """
    seen = scene.digit_of.gather(1, subject)
    last = torch.where(mode == CHAIN, seen % COLOURS, subject)
    cells = torch.stack([scene.cell_of.gather(1, subject), scene.cell_of.gather(1, last)], dim=-1)
    return scene.digit_of.gather(1, last), cells


def question(mode: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
    """Token ids [B, turns, 3]: mode, assistant, colour. The colour stands last: the model answers there."""
    return torch.stack([mode, torch.full_like(mode, ASSISTANT), COLOUR0 + subject], dim=-1)


def patches_of_cell(cell: torch.Tensor) -> torch.Tensor:
    """The four image tokens [..., 4] that lie in a grid cell [...]."""
    per_cell, per_side = CELL // PATCH, SIDE // PATCH
    row, column = cell // GRID * per_cell, cell % GRID * per_cell
    offsets = [(r, c) for r in range(per_cell) for c in range(per_cell)]
    return torch.stack([(row + r) * per_side + column + c for r, c in offsets], dim=-1)
