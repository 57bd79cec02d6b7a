"""A quantised linear as tensors: what a checkpoint holds, what the operators take, and what it stands for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thresher.formats import bitpack, nvfp4

from ..config import SCALE_DTYPES, RSQConfig
from .grid import Grid, IntegerGrid, NVFP4Grid
from .rounding import Rounded

Tensors = Mapping[str, torch.Tensor]


def make_grid(config: RSQConfig, bits: int) -> Grid:
    """The grid the options ask for."""
    if config.grid == "nvfp4":
        return NVFP4Grid(search=config.clip_search)
    return IntegerGrid(
        bits, config.group_size, config.symmetric, config.clip_search, SCALE_DTYPES[config.scale_dtype]
    )


def to_tensors(found: Rounded, config: RSQConfig, bits: int) -> dict[str, torch.Tensor]:
    """Tensors by name, for one quantised linear.

    Integers: `codes` int32 [N, words(K, bits)], `scales` [N, G], `zeros` uint8 [N, G] where they are not all
    in the middle, `bits` and `inputs` int64 []. NVFP4: `codes` uint8 [N, K/2] (even columns in low nibbles),
    `block_scales` uint8 [N, K/16] (E4M3 bytes), `global_scale` fp32 [].
    """
    codes = found.codes
    if isinstance(found.grid, NVFP4Grid):
        return {
            "codes": (codes[:, ::2] | codes[:, 1::2] << 4).contiguous(),
            "block_scales": found.grid.stored_scales(found.parameters[0]).view(torch.uint8).contiguous(),
            "global_scale": torch.tensor(found.grid.tensor_scale, dtype=torch.float32),
        }
    scale, zero = found.parameters
    tensors = {
        "codes": bitpack.pack(codes, bits),
        "scales": scale.to(SCALE_DTYPES[config.scale_dtype]).contiguous(),
        "bits": torch.tensor(bits),
        "inputs": torch.tensor(codes.shape[1]),
    }
    if not config.symmetric:
        tensors["zeros"] = zero.to(torch.uint8).contiguous()
    return tensors


def values(tensors: Tensors) -> torch.Tensor:
    """fp32 [N, K]: the weight that the tensors stand for."""
    if "block_scales" in tensors:
        return nvfp4.dequantized(tensors["codes"], tensors["block_scales"], tensors["global_scale"])
    codes = bitpack.unpack(tensors["codes"], int(tensors["bits"]), int(tensors["inputs"])).float()
    scales = tensors["scales"].float()
    rows, groups = scales.shape
    zero = (
        tensors["zeros"].float()[..., None] if "zeros" in tensors else float(1 << (int(tensors["bits"]) - 1))
    )
    return ((codes.view(rows, groups, -1) - zero) * scales[..., None]).view(rows, -1)


def stands_for(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The same in another dtype: what a model that holds its weights in it computes with."""
    return values(tensors).to(dtype)


def stored_bytes(tensors: Tensors) -> int:
    """Bytes of codes, scales and zero points."""
    return sum(t.numel() * t.element_size() for n, t in tensors.items() if n not in ("bits", "inputs"))
