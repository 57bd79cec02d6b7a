"""What NVFP4 quantization must give, written from each tool's definition in numpy, and data to compare on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

F = np.float32
E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def distributions(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Six kinds of data, as matrices of 256 columns."""
    generator = torch.Generator().manual_seed(0)
    shape = (count // 256, 256)

    def normal():
        return torch.randn(shape, generator=generator)

    yield "normal bf16", normal().bfloat16()
    yield "small normal", normal() * 0.02
    yield "rows down to 2^-24", normal() * torch.logspace(0, -24, shape[0], base=2)[:, None]
    yield "half precision with outliers", (normal() ** 3).half()
    zeros = normal() * (torch.rand(shape, generator=generator) > 0.5)
    zeros[::3] = 0
    zeros[1::3] *= -1
    yield "zeros of both signs, zero rows", zeros
    denormal = normal()
    denormal[1::2] *= 1e-39
    yield "denormals", denormal


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the nearest entry in float64, ties to the even index, saturating."""
    middle = (table[1:] + table[:-1]) / 2
    below = np.searchsorted(middle, values, side="left")  # the tie itself stays below
    tie = (below < len(middle)) & (values == middle[np.minimum(below, len(middle) - 1)])
    return np.where(tie & (below % 2 == 1), below + 1, below)


ORACLES = ("thresher", "te", "modelopt", "compressed_tensors")


def oracle(x: torch.Tensor, mode: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Codes [R, K], scale bytes [R, K / 16] and the stored tensor scale of `x` [R, K]; mode: one of ORACLES."""
    data = x.float().numpy().reshape(*x.shape[:-1], -1, 16)
    block = np.abs(data).max(-1)
    amax = block.max()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if mode in ("thresher", "te"):
            encode = min(F(2688) / amax, np.finfo(F).max)
            raw = block * (encode * (F(1) / F(6)))
            scales = E4M3[nearest(np.clip(raw, F(0 if mode == "te" else 2**-9), F(448)).astype(float), E4M3)]
            if mode == "thresher":
                scales = np.where(block > 0, scales, 1.0)
            stored, decode = F(1) / encode, F(1) / encode
            scaled = data * np.minimum(F(1) / (scales.astype(F) * decode), np.finfo(F).max)[..., None]
        elif mode == "modelopt":
            stored = amax / F(2688)
            raw = block / (F(6) * stored)
            raw = np.where(raw == 0, F(1), raw)
            scales = E4M3[nearest(np.clip(raw, F(2**-9), F(448)).astype(float), E4M3)]
            scaled = data / (scales.astype(F) * stored)[..., None]
        else:
            stored = F(1) / max(amax, np.finfo(F).tiny) * F(2688)  # how torch divides a number by a tensor
            sixth = torch.from_numpy(block).to(x.dtype).div(6).float().numpy()
            scales = E4M3[nearest(np.clip(stored * sixth, F(0), F(448)).astype(float), E4M3)]
            scales = np.where(scales == 0, 0.125, scales)
            scaled = data / (scales.astype(F) / stored)[..., None]
    codes = nearest(np.abs(scaled).astype(float), E2M1) | np.where(scaled < 0, 8, 0)
    bytes_ = np.searchsorted(E4M3, scales)
    return codes.reshape(x.shape).astype(np.uint8), bytes_.astype(np.uint8), stored
