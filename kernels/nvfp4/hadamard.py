"""The random Hadamard transform of blocks of 16 that NVFP4 training puts before a product over tokens."""

from __future__ import annotations

import torch

from thresher.errors import ArgumentError
from thresher.formats.nvfp4 import BLOCK


def hadamard16(signs: torch.Tensor | None = None) -> torch.Tensor:
    """The orthogonal 16x16 matrix of the random Hadamard transform: diag(signs) H / 4, fp32."""
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (h if signs is None else signs.float().cpu()[:, None] * h) / 4


def random_hadamard(x: torch.Tensor, signs: torch.Tensor | None = None) -> torch.Tensor:
    """Rotate each run of 16 along the last dimension. The same signs on both factors of a GEMM cancel.

    signs: [16] of +-1; x: [..., K], K a multiple of 16. Computed in fp32, returned in x's dtype.
    """
    if x.shape[-1] % BLOCK:
        given = f"a last dimension of {x.shape[-1]}"
        raise ArgumentError("x", given, "a multiple of 16", "Pad it with zeros.")
    rotated = x.float().unflatten(-1, (-1, BLOCK)) @ hadamard16(signs).to(x.device)
    return rotated.flatten(-2).to(x.dtype)
