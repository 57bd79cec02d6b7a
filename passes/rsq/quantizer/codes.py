"""A quantised linear as tensors: what a checkpoint holds, what the operators take, and what it stands for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thresher.formats import bitpack, nvfp4

from ..config import SCALE_DTYPES, RSQConfig
from .grid import Grid, IntegerGrid, NVFP4Grid
from .rounding import Rounded

Tensors = Mapping[str, torch.Tensor]
STACKED = ("codes", "scales", "zeros", "block_scales", "global_scale")  # by expert, for those of a mixture


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


def of_expert(tensors: Tensors, expert: int) -> Tensors:
    """One expert's part of the tensors of a mixture's, which are stacked."""
    return {n: t[expert] if n in STACKED else t for n, t in tensors.items()}


def values(tensors: Tensors) -> torch.Tensor:
    """fp32 [N, K]: the weight that the tensors stand for; [E, N, K] for those of experts."""
    if tensors["codes"].dim() == 3:
        return torch.stack([values(of_expert(tensors, e)) for e in range(len(tensors["codes"]))])
    if "block_scales" in tensors:
        return nvfp4.dequantized(tensors["codes"], tensors["block_scales"], tensors["global_scale"])
    codes = bitpack.unpack(tensors["codes"], int(tensors["bits"]), int(tensors["inputs"])).float()
    scales = tensors["scales"].float()
    rows, groups = scales.shape
    zero = (
        tensors["zeros"].float()[..., None] if "zeros" in tensors else float(1 << (int(tensors["bits"]) - 1))
    )
    return ((codes.view(rows, groups, -1) - zero) * scales[..., None]).view(rows, -1)


def shape(tensors: Tensors) -> tuple[int, ...]:
    """(N, K), or (E, N, K) for a mixture's, of the weight that the tensors stand for."""
    if tensors["codes"].dim() == 3:
        return len(tensors["codes"]), *values(of_expert(tensors, 0)).shape
    return tuple(values(tensors).shape)


def stands_for(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The same in another dtype: what a model that holds its weights in it computes with."""
    return values(tensors).to(dtype)


def experts_for(tensors: Tensors, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """The same for a mixture's: [experts, out, in], or [experts, in, out] where the model stores them so."""
    first = values(of_expert(tensors, 0))
    count, shape = len(tensors["codes"]), first.t().shape if transposed else first.shape
    made = torch.empty(count, *shape, dtype=dtype, device=first.device)
    for expert in range(count):
        one = values(of_expert(tensors, expert))
        made[expert] = one.t() if transposed else one
    return made


def stored_bytes(tensors: Tensors) -> int:
    """Bytes of codes, scales and zero points."""
    return sum(t.numel() * t.element_size() for n, t in tensors.items() if n not in ("bits", "inputs"))
