"""Quantizing to NVFP4: the arithmetic of five tools, scale search, and the training recipe's helpers.

All modes share two levels (arXiv 2509.25149, appendix B): a tensor scale that maps the largest
magnitude to 6 * 448, and one E4M3 scale a block of 16. They differ in the order of fp32 operations
and in how they treat tiny blocks, so bytes agree only within a mode. `thresher` is `te` with block
scales clamped to at least 2^-9 (keeps rows up to 2^-20 below the tensor's maximum) and 1 for a zero
block. An all-zero tensor gets a tensor scale of 1 in every mode; torchao and modelopt themselves
divide by zero there and write NaN scales. Likewise zeros stay zero in a tensor below 1e-35, where
torchao multiplies them by infinity and writes 1.5.

Plain quantization of a CPU tensor runs in one fused C++ pass that gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError, unknown_key
from thresher.formats.nvfp4 import (
    BLOCK,
    E2M1_MAX,
    E4M3_MAX,
    SCALE_NAN,
    decode_e2m1,
    encode_e2m1,
    encode_e2m1_stochastic,
    pack,
    pad_blocks,
    unpack,
)

from . import cpu as nvfp4_cpu

FOUR_OVER_SIX_MAX = 256.0
"""Largest block scale aimed at when blocks may map to 4: leaves room for the factor 1.5."""
_FLT_MAX = torch.finfo(torch.float32).max
_SIXTH = torch.tensor(1.0) / 6.0


@dataclass(frozen=True)
class NVFP4Weight:
    """A quantized matrix.

    codes: uint8 [N, ceil(K/16)*8], two E2M1 codes a byte, even k in the low nibble.
    block_scales: float8_e4m3fn [N, ceil(K/16)].
    global_scale: float32 [], multiplies: value = code * block_scale * global_scale.
    in_features: K before padding.
    input_scale: float32 tensor scale of the activations, if calibrated.
    stored_global, stored_input: both scales exactly as a checkpoint held them, perhaps as reciprocals;
        1/(1/x) is not x in fp32, so saving without loss needs the originals.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    global_scale: torch.Tensor
    in_features: int
    input_scale: torch.Tensor | None = None
    stored_global: torch.Tensor | None = None
    stored_input: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [N, K] in `dtype`; the products are formed in fp32."""
        blocks = decode_e2m1(unpack(self.codes)).unflatten(-1, (-1, BLOCK))
        values = blocks * (self.block_scales.float() * self.global_scale).unsqueeze(-1)
        return values.flatten(-2)[..., : self.in_features].to(dtype)


@dataclass(frozen=True)
class Mode:
    """The fp32 arithmetic of one tool. Every tensor is fp32; `g` is what the mode's tensor_scale gave.

    tensor_scale: (amax [], largest block scale) -> the tensor scale in the mode's own form.
    block_scale: (block amax, g, input dtype) -> E4M3 scales as fp32 values.
    multiplier: (block scales, g) -> what elements are multiplied by (or divided, if `divides`).
    decode: g -> the multiplying fp32 tensor scale.
    """

    name: str
    tensor_scale: Callable[[torch.Tensor, float], torch.Tensor]
    block_scale: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
    multiplier: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    divides: bool = False
    keep_negative_zero: bool = False


def _e4m3(scales: torch.Tensor, least: float) -> torch.Tensor:
    return scales.clamp(least, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _encode_scale(amax: torch.Tensor, top: float) -> torch.Tensor:
    # A tensor divided by a tensor: a Python number on the left would become reciprocal, then product.
    encode = torch.full_like(amax, E2M1_MAX * top) / amax
    return torch.where(amax > 0, encode.clamp(max=_FLT_MAX), 1.0)


def _decode_scale(amax: torch.Tensor, top: float) -> torch.Tensor:
    scale = amax / (E2M1_MAX * top)
    return torch.where(scale > 0, scale, 1.0)


def _te_block(amax: torch.Tensor, g: torch.Tensor, _: torch.dtype) -> torch.Tensor:
    return _e4m3(amax * (g * _SIXTH), 0.0)


def _thresher_block(amax: torch.Tensor, g: torch.Tensor, _: torch.dtype) -> torch.Tensor:
    return torch.where(amax > 0, _e4m3(amax * (g * _SIXTH), 2.0**-9), 1.0)


def _te_multiplier(s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (1.0 / (s * (1.0 / g))).clamp(max=_FLT_MAX)


def _torchao_block(amax: torch.Tensor, g: torch.Tensor, _: torch.dtype) -> torch.Tensor:
    return _e4m3(amax / E2M1_MAX / g, 2.0**-6)


def _modelopt_block(amax: torch.Tensor, g: torch.Tensor, _: torch.dtype) -> torch.Tensor:
    scales = amax / (E2M1_MAX * g)
    return _e4m3(torch.where(scales == 0, 1.0, scales), 2.0**-9)


def _compressed_tensors_scale(amax: torch.Tensor, top: float) -> torch.Tensor:
    encode = amax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal() * (E2M1_MAX * top)
    return encode.nan_to_num(nan=1.0, posinf=1.0)


def _compressed_tensors_block(amax: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scales = _e4m3(g * (amax.to(dtype) / E2M1_MAX).float(), 0.0)
    return torch.where(scales == 0, 0.125, scales)  # 0.125 is that library's E4M3 epsilon


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("thresher", _encode_scale, _thresher_block, _te_multiplier, torch.reciprocal),
        Mode("te", _encode_scale, _te_block, _te_multiplier, torch.reciprocal),
        Mode(
            "torchao",
            _decode_scale,
            _torchao_block,
            lambda s, g: (1.0 / g) / s,
            lambda g: g,
            keep_negative_zero=True,
        ),
        Mode("modelopt", _decode_scale, _modelopt_block, lambda s, g: s * g, lambda g: g, divides=True),
        Mode(
            "compressed_tensors",
            _compressed_tensors_scale,
            _compressed_tensors_block,
            lambda s, g: s / g,
            torch.reciprocal,
            divides=True,
        ),
    )
}
SEARCHES = ("none", "four_over_six", "mse")


def mode_named(name: str) -> Mode:
    """The mode of that name; an unknown one is an error that lists them."""
    if name not in MODES:
        raise unknown_key("mode", name, MODES)
    return MODES[name]


def quantize(
    x: torch.Tensor,
    *,
    mode: str = "thresher",
    two_dimensional: bool = False,
    search: str = "none",
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    amax: torch.Tensor | None = None,
    nonfinite: str = "raise",
    name: str = "x",
) -> NVFP4Weight:
    """Quantize `x` [N, K] (fp32, bf16 or fp16); K is zero-padded to a multiple of 16.

    two_dimensional: one scale for each 16x16 tile (training's weights, so that x and x^T agree).
    search: "four_over_six" lets each block map its maximum to 4 or to 6, whichever errs less
        (arXiv 2512.02010); "mse" tries the E4M3 scales around the plain one.
    stochastic: round stochastically (gradients), drawing from `generator`.
    amax: a tensor maximum other than the data's own; what exceeds it saturates.
    nonfinite: "raise", or "propagate": a block that holds NaN or infinity gets a NaN scale.
    name: how errors call the tensor; give the weight's full name.
    """
    spec = mode_named(mode)
    _check(x, search, nonfinite, name, two_dimensional)
    plain = search == "none" and not (stochastic or two_dimensional)
    if plain and nvfp4_cpu.accepts(x):
        largest = nvfp4_cpu.amax(x)
        if largest.isfinite():  # otherwise the blocks to blame must be found
            g = spec.tensor_scale(largest if amax is None else amax.float(), E4M3_MAX)
            codes, stored = nvfp4_cpu.quantize(x, float(g), mode)
            return _finish(codes, stored, g, x.shape[-1], spec)
    padded_x = pad_blocks(x).float()
    blocks = padded_x.unflatten(-1, (-1, BLOCK))
    bad = ~torch.isfinite(blocks).all(-1)
    if bool(bad.any()):
        if nonfinite == "raise":
            raise ArgumentError(
                name,
                f"{int((~torch.isfinite(x)).sum())} NaN or infinite values",
                "finite values only",
                'Repair the tensor, or pass nonfinite="propagate" to write NaN scales for those blocks.',
            )
        blocks = blocks.masked_fill(bad.unsqueeze(-1), 0.0)
    block_amax = _tile_amax(blocks) if two_dimensional else blocks.abs().amax(-1)
    top = FOUR_OVER_SIX_MAX if search == "four_over_six" else E4M3_MAX
    if amax is None:
        amax = block_amax.max() if block_amax.numel() else block_amax.new_zeros(())
    g = spec.tensor_scale(amax.float(), top)
    scales = spec.block_scale(block_amax, g, x.dtype)
    if search != "none":
        scales = _search(blocks, scales, g, spec, search, two_dimensional)
    scaled = _scaled(blocks, scales, g, spec)
    if stochastic:
        codes = encode_e2m1_stochastic(scaled, generator)
    else:
        codes = encode_e2m1(scaled, keep_negative_zero=spec.keep_negative_zero)
    stored = scales.to(torch.float8_e4m3fn)
    stored.view(torch.uint8)[bad] = SCALE_NAN
    return _finish(pack(codes.flatten(-2)), stored, g, x.shape[-1], spec)


def _finish(codes: torch.Tensor, stored: torch.Tensor, g: torch.Tensor, k: int, spec: Mode) -> NVFP4Weight:
    original = g.reshape(1) if spec.name == "compressed_tensors" else None
    return NVFP4Weight(codes, stored, spec.decode(g), k, stored_global=original)


def _check(x: torch.Tensor, search: str, nonfinite: str, name: str, two_dimensional: bool) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ArgumentError(name, x.dtype, "float32, bfloat16 or float16", "Convert it first.")
    if search not in SEARCHES:
        raise unknown_key("search", search, SEARCHES)
    if nonfinite not in ("raise", "propagate"):
        raise unknown_key("nonfinite", nonfinite, ("raise", "propagate"))
    if x.dim() < 1 or (two_dimensional and x.dim() != 2):
        accepted = "a matrix [N, K]" if two_dimensional else "at least one dimension"
        raise ArgumentError(name, f"{x.dim()} dimensions", accepted, "Reshape it first.")


def _tile_amax(blocks: torch.Tensor) -> torch.Tensor:
    """[N, B, 16] to the maximum of each 16x16 tile, repeated for its rows: [N, B]."""
    rows = blocks.shape[0]
    amax = torch.nn.functional.pad(blocks.abs().amax(-1), (0, 0, 0, -rows % BLOCK))
    return amax.unflatten(0, (-1, BLOCK)).amax(1).repeat_interleave(BLOCK, 0)[:rows]


def _scaled(blocks: torch.Tensor, scales: torch.Tensor, g: torch.Tensor, spec: Mode) -> torch.Tensor:
    factor = spec.multiplier(scales, g).unsqueeze(-1)
    return (blocks / factor if spec.divides else blocks * factor).clamp(-E2M1_MAX, E2M1_MAX)


def _search(
    blocks: torch.Tensor, scales: torch.Tensor, g: torch.Tensor, spec: Mode, search: str, tiled: bool
) -> torch.Tensor:
    """The candidate scale with the least squared error for each block (each tile, if `tiled`)."""

    def error(candidate: torch.Tensor) -> torch.Tensor:
        codes = encode_e2m1(_scaled(blocks, candidate, g, spec))
        back = decode_e2m1(codes) * (candidate * spec.decode(g)).unsqueeze(-1)
        squared = (back - blocks).square().sum(-1)
        if not tiled:
            return squared
        rows = squared.shape[0]
        whole = torch.nn.functional.pad(squared, (0, 0, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
        return whole.sum(1).repeat_interleave(BLOCK, 0)[:rows]

    if search == "four_over_six":
        candidates = [_e4m3(scales * 1.5, 0.0)]
    else:
        # Eight codes a binade: from half the plain scale (clips the maximum) to 1.5 times it (maps it to 4).
        byte = scales.to(torch.float8_e4m3fn).view(torch.uint8).int()
        offsets = [d for d in range(-8, 6) if d]
        candidates = [
            (byte + d).clamp(1, 0x7E).to(torch.uint8).view(torch.float8_e4m3fn).float() for d in offsets
        ]
    best, least = scales, error(scales)
    for candidate in candidates:
        found = error(candidate)
        better = found < least
        best, least = torch.where(better, candidate, best), torch.where(better, found, least)
    return best
