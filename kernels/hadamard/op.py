"""The Hadamard transform of the last dimension: `thresher::hadamard`.

A rotation that flattens a tensor's outliers without changing the product it feeds: x W = (x R)(R^T W).
With R = diag(signs) H / sqrt(n) it costs n log n. RSQ and QuaRot put it before the down projection.
"""

from __future__ import annotations

import torch

from thresher.errors import ArgumentError
from thresher.formats.hadamard import check_order, matrix
from thresher.graph.token_labels import row_by_row
from thresher.ops import Sample, define

from .plain import PLAIN

# A transform is an orthogonal map: its error is that of one fp32 dot product, and for half types the
# rounding of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def check(x: torch.Tensor, signs: torch.Tensor | None, block: int) -> None:
    """Raise ArgumentError unless the arguments fit together. Reads metadata only."""
    width = x.shape[-1] if x.dim() else 0
    if block < 1 or width == 0 or width % block:
        raise ArgumentError(
            "block",
            block,
            f"a divisor of the last dimension {width}",
            "Pass the last dimension for one block.",
        )
    check_order("block", block)
    if not x.is_floating_point():
        raise ArgumentError("x", str(x.dtype), "a floating dtype", "Convert it first.")
    if signs is not None and (signs.shape != (width,) or not signs.is_floating_point()):
        raise ArgumentError(
            "signs",
            f"{signs.dtype} {tuple(signs.shape)}",
            f"floating [{width}], each 1 or -1",
            "Make one per column.",
        )


def _fake(x, signs, block):
    check(x, signs, block)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)
    cases = [  # label, leading shape, width, block, signs
        ("12 x 128", (3,), 1536, 1536, True),
        ("36 x 16, three dimensions", (2, 3), 576, 576, False),
        ("power of two", (5,), 64, 64, True),
        ("blocks", (3,), 192, 64, True),
        ("blocks of 20", (2,), 60, 20, False),
        ("Paley alone", (4,), 36, 36, True),
        ("order two", (3,), 6, 2, False),
        ("order one", (3,), 5, 1, True),
        ("one row, no leading dimension", (), 96, 96, False),
        ("no rows", (0,), 64, 64, False),
        ("wide base", (2,), 152, 152, True),
    ]
    if dtype != torch.float32:
        cases = cases[:4]
    samples = []
    for label, lead, width, block, signed in cases:
        x = torch.randn(*lead, width, generator=make).to(device, dtype)
        signs = (torch.randint(0, 2, (width,), generator=make) * 2.0 - 1).to(device) if signed else None
        samples.append(Sample(label, (x, signs, block)))
    strided = torch.randn(64, 6, generator=make).to(device, dtype).t()
    return [*samples, Sample("not contiguous", (strided, None, 64))]


@define(
    "hadamard(Tensor x, Tensor? signs, int block) -> Tensor",
    fake=_fake,
    inputs=_samples,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "triton"),
    tokens=row_by_row,
    plain=PLAIN,
    check=check,
)
def hadamard(x, signs, block):
    """Each run of `block` columns of `x * signs` times the orthogonal Hadamard matrix of that order.

    x: floating [..., n]. signs: floating [n], each 1 or -1, or None. block: a divisor of n whose
    Hadamard matrix exists by construction. Computed in fp32 (fp64 for fp64), returned in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    signed = x.to(wide) if signs is None else x.to(wide) * signs.to(wide)
    blocks = signed.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return (blocks @ matrix(block, wide).to(x.device)).reshape(x.shape).to(x.dtype)
