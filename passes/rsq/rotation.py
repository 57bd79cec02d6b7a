"""Rotations that leave a decoder's function unchanged, as tensor maths (RSQ section 3.1; QuaRot).

A residual stream h can be kept as h R with R orthogonal: every linear that reads it takes W R, every linear
that writes to it R^T W, and the embedding E R. An RMSNorm without weight commutes with R, so its weight is
first fused into the readers; a LayerNorm subtracts a mean too, so the writers are centred first. The same
identity per head serves value and output projections, and with an online transform the down projection.

Weights are `[out_features, in_features]`, as in `torch.nn.Linear`. Everything is computed in fp64 and
returned in the weight's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError
from thresher.formats.hadamard import base_matrix, decompose, sylvester

_FP64 = 1 << 21  # elements of a weight held in fp64 at a time: 16 MiB, of which rotating holds a few copies
KINDS = ("auto", "hadamard", "block", "orthogonal")


@dataclass(frozen=True)
class Rotation:
    """An orthogonal R of order `order`.

    block: R is diag(signs) times copies of the Hadamard matrix of this order along the diagonal; 0 when R
        is dense. Only a Hadamard rotation can run online (`thresher::hadamard`).
    signs: float64 [order] of +-1, or None. dense: float64 [order, order], or None.
    note: one sentence that says which construction was used and, where it is a fallback, why.
    """

    order: int
    block: int
    signs: torch.Tensor | None
    dense: torch.Tensor | None
    note: str

    def right(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight @ R` over the last dimension, in fp64."""
        wide = weight.to(torch.float64)
        if self.dense is not None:
            return wide @ self.dense.to(wide.device)
        if self.signs is not None:
            wide = wide * self.signs.to(wide.device)
        # The matrix is base (x) Sylvester, and Sylvester's is one of itself: products with small matrices cost a
        # tenth of one with the whole, and of order 2048 a twentieth.
        base = base_matrix(self.block).double().to(wide.device)
        two = self.block // len(base)
        low = 1 << (two.bit_length() - 1) // 2
        factors = [base, *(sylvester(n).double().to(wide.device) for n in (two // low, low))]
        shape = wide.shape
        after = self.block
        for matrix in factors:
            after //= len(matrix)
            if len(matrix) > 1:
                wide = wide.reshape(-1, len(matrix), after).transpose(1, 2)
                wide = (
                    (wide.reshape(-1, len(matrix)) @ matrix).reshape(-1, after, len(matrix)).transpose(1, 2)
                )
        return wide.reshape(shape) / math.sqrt(self.block)

    def matrix(self) -> torch.Tensor:
        """float64 [order, order]."""
        return self.right(torch.eye(self.order, dtype=torch.float64))


def rotation(order: int, seed: int, kind: str = "auto", signed: bool = True) -> Rotation:
    """A rotation of the given order; the same arguments give the same rotation.

    kind: "hadamard" (refused where the order has none by construction), "block" (Hadamard matrices of the
        largest such order that divides, along the diagonal), "orthogonal" (dense, from a seeded Gaussian), or
        "auto": the first of "hadamard" and "orthogonal" that exists. Use "block" where "hadamard" does not
        exist and the rotation must run online.
    signed: multiply the columns of the input by random signs first. Sites in several layers that share a
        rotation share its seed.
    """
    if kind not in KINDS:
        raise ArgumentError("kind", repr(kind), ", ".join(KINDS), "Choose one of those.")
    if order < 1:
        raise ArgumentError("order", order, "a positive integer", "Pass the width of the rotated dimension.")
    make = torch.Generator().manual_seed(seed)
    exists = decompose(order) is not None
    if kind == "hadamard" and not exists:
        raise ArgumentError(
            "order",
            order,
            "an order with a Sylvester x Paley Hadamard matrix",
            "Use kind='block' or 'orthogonal'.",
        )
    if kind == "orthogonal" or (kind == "auto" and not exists):
        why = "" if exists else f": no Hadamard matrix of order {order} is constructed here"
        gaussian = torch.randn(order, order, generator=make, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        dense = q * torch.sign(torch.diagonal(r))  # the sign makes the distribution uniform (Haar)
        return Rotation(
            order, 0, None, dense, f"Random orthogonal matrix of order {order}, seed {seed}{why}."
        )
    signs = torch.randint(0, 2, (order,), generator=make).double() * 2 - 1 if signed else None
    block = order
    if kind == "block" and not exists:
        block = max(b for b in range(1, order + 1) if order % b == 0 and decompose(b) is not None)
    paley, two = decompose(block) or ((), 1)
    parts = " x ".join(str(part) for part in (*paley, *((two,) if two > 1 or not paley else ())))
    note = f"Hadamard matrix of order {block} ({parts})"
    if signs is not None:
        note += f" with random signs, seed {seed}"
    if block < order:
        note += f", in {order // block} blocks: no Hadamard matrix of order {order} is constructed here"
    return Rotation(order, block, signs, None, note + ".")


def fuse_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, gain: torch.Tensor, shift: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of a reader that also applies its norm's gain (and a LayerNorm's shift).

    weight: [N, K]; gain, shift: [K]. The norm's gain then becomes 1 and its shift 0. For a norm that
    multiplies by 1 + gain (Gemma), pass 1 + gain.
    """
    fused = _by_rows(weight, lambda wide: wide * gain.to(torch.float64))
    if shift is None:
        return fused, bias
    extra = weight.to(torch.float64) @ shift.to(torch.float64)
    if bias is not None:
        extra = extra + bias.to(torch.float64)
    return fused, extra.to(weight.dtype if bias is None else bias.dtype)


def centre_writer(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A writer whose output has mean zero over the stream, so that LayerNorm becomes RMSNorm.

    weight: [d, K], or a [vocabulary, d] embedding passed transposed.
    """
    wide = weight.to(torch.float64)
    centred = (wide - wide.mean(0, keepdim=True)).to(weight.dtype)
    if bias is None:
        return centred, None
    wide = bias.to(torch.float64)
    return centred, (wide - wide.mean()).to(bias.dtype)


def rotate_reader(weight: torch.Tensor, r: Rotation) -> torch.Tensor:
    """W R: a linear (or a [vocabulary, d] embedding or head) whose input is the rotated stream."""
    return _by_rows(weight, r.right)


def rotate_writer(
    weight: torch.Tensor, bias: torch.Tensor | None, r: Rotation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """R^T W and bias R: a linear whose output is added to the rotated stream."""
    return _by_rows(weight.t(), r.right).t().contiguous(), None if bias is None else r.right(bias).to(
        bias.dtype
    )


def rotate_heads_out(
    weight: torch.Tensor, bias: torch.Tensor | None, r: Rotation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The value projection [heads * order, K] with each head's output rotated, its bias with it."""
    heads = _heads("weight", weight.shape[0], r)
    split = weight.reshape(heads, r.order, weight.shape[1]).transpose(1, 2)
    rotated = _by_rows(split.reshape(-1, r.order), r.right).view(split.shape)
    return rotated.transpose(1, 2).reshape(weight.shape), None if bias is None else r.right(
        bias.reshape(heads, -1)
    ).reshape(-1).to(bias.dtype)


def rotate_heads_in(weight: torch.Tensor, r: Rotation) -> torch.Tensor:
    """The output projection [d, heads * order] that reads heads rotated by `rotate_heads_out`.

    With grouped queries every query head reads the rotation of its value head: one R serves them all.
    """
    _heads("weight", weight.shape[1], r)
    return _by_rows(weight.reshape(-1, r.order), r.right).reshape(weight.shape)


def _by_rows(weight: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`change` of a matrix's rows, in its own dtype; few are held in fp64 at a time. A change sees rows alone."""
    step = max(1, _FP64 // max(1, weight.shape[1]))
    if len(weight) <= step:
        return change(weight.to(torch.float64)).to(weight.dtype)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for first in range(0, len(weight), step):
        out[first : first + step] = change(weight[first : first + step].to(torch.float64))
    return out


def _heads(argument: str, width: int, r: Rotation) -> int:
    if width % r.order:
        raise ArgumentError(
            argument,
            f"width {width}",
            f"a multiple of the head dimension {r.order}",
            "Pass one layer's weight.",
        )
    return width // r.order
