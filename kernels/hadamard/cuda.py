"""CUDA provider of the Hadamard transform, in Triton.

A block's matrix is L (x) S with S Sylvester's of at most 64 and L the rest. A program turns one block, laid out
as a matrix X: y = L^T X S / sqrt(n), two small products that stay on the chip, on the tensor cores in three TF32
parts (fp32 precision, since S and L are exact). S is made from the parity of `i & j`; L is a constant.
"""

from __future__ import annotations

import functools
import math

import torch

from thresher.formats.hadamard import base_matrix, decompose, sylvester

from ..optional_triton import MISSING
from . import op as defs

_MOST_ROWS = 32  # of L; beyond it the products spill registers
_COLUMNS = 64

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def transform(x, signs, left, y, height, width, blocks, scale, SIGNED: tl.constexpr, H: tl.constexpr,
                  W: tl.constexpr):  # fmt: skip
        """One block of height * width elements a program. Grid (rows * blocks,).

        left: fp32 [H, H], L transposed in its first `height` rows and columns, zero elsewhere. H, W: powers of
        two, at least 16, not below height and width.
        """
        pid = tl.program_id(0).to(tl.int64)
        row, column = tl.arange(0, H), tl.arange(0, W)
        place = row[:, None] * width + column[None, :]
        inside = (row < height)[:, None] & (column < width)[None, :]
        size = height * width
        value = tl.load(x + pid * size + place, mask=inside, other=0.0).to(tl.float32)
        if SIGNED:
            value *= tl.load(signs + (pid % blocks) * size + place, mask=inside, other=0.0)
        both = tl.arange(0, W)[:, None] & column[None, :]
        both = both ^ (both >> 4)
        both = both ^ (both >> 2)
        both = both ^ (both >> 1)
        right = 1.0 - 2.0 * (both & 1).to(tl.float32)
        value = tl.dot(value, right, input_precision="tf32x3")
        turn = tl.load(left + row[:, None] * H + tl.arange(0, H)[None, :])
        value = tl.dot(turn, value, input_precision="tf32x3") * scale
        tl.store(y + pid * size + place, value.to(y.dtype.element_ty), mask=inside)


@functools.cache
def _left(block: int, device: torch.device) -> tuple[torch.Tensor, int, int]:
    """(fp32 [H, H], height, width) of a block's two factors."""
    height, width = factors(block)
    side = max(16, 1 << (height - 1).bit_length())
    _, two = decompose(block)  # type: ignore[misc]
    padded = torch.zeros(side, side)
    padded[:height, :height] = torch.kron(base_matrix(block), sylvester(two // width)).t()
    return padded.to(device), height, width


def factors(block: int) -> tuple[int, int]:
    """(rows, columns) a block is laid out in."""
    _, two = decompose(block)  # type: ignore[misc]
    width = min(two, _COLUMNS)
    return block // width, width


def launch(x: torch.Tensor, signs: torch.Tensor | None, block: int) -> torch.Tensor:
    """Transform a contiguous tensor."""
    left, height, width = _left(block, x.device)
    y = torch.empty_like(x)
    if x.numel():
        blocks = x.shape[-1] // block
        transform[(x.numel() // block,)](
            x, y if signs is None else signs, left, y, height, width, blocks, 1 / math.sqrt(block),
            SIGNED=signs is not None, H=left.shape[0], W=max(16, width), num_warps=8,
        )  # fmt: skip
    return y


def _supported() -> str | None:
    if MISSING:
        return MISSING
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "The Triton transform needs an NVIDIA GPU, and torch sees none."
    found = torch.cuda.get_device_capability()
    return (
        None if found >= (8, 0) else f"It needs compute capability 8.0; this GPU has {found[0]}.{found[1]}."
    )


def _accepts(x, signs, block):
    if x.dtype == torch.float64:
        return "It computes in fp32; fp64 runs the reference."
    rows, _ = factors(block)
    return (
        None if rows <= _MOST_ROWS else f"A block of {block} leaves a factor of {rows}, above {_MOST_ROWS}."
    )


@defs.hadamard.provider("triton", device="cuda", supported=_supported, supports_args=_accepts)
def _hadamard_triton(x, signs, block):
    return launch(x.contiguous(), None if signs is None else signs.float().contiguous(), block)
