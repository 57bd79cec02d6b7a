"""CUDA providers of `thresher::nvfp4_linear`.

    scaled_mm     W4A4 on compute capability 10.0 and above, through torch.nn.functional.scaled_mm
    triton_w4a4   W4A4 on 12.x through Triton's block-scaled product
    triton_rounded  W4A4 from 8.0 on: activations rounded to NVFP4, multiplied by the A16W4 kernels
    triton_gemv   A16W4, at most 4 rows, compute capability 8.0 and above
    triton_gemm   A16W4, any number of rows, fp16 and bf16

A16W4 means unrounded activations; W4A4 serves `activations="nvfp4"`. The integer modes are for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from thresher.formats.nvfp4 import BLOCK, decode_e2m1, swizzle, unpack
from thresher.ops import Op

from .. import optional_triton
from ..derived import derived
from . import triton_kernels as nvfp4_triton
from .quantize import NVFP4Weight, quantize

GEMV_ROWS = 4


def gemv_tile() -> dict[str, int]:
    """Tile and launch options of the GEMV."""
    return {"BN": 8, "BK": 512, "num_warps": 4}


def gemm_tile(rows: int, capability: int) -> dict[str, int]:
    """Tile and launch options of the GEMM for that many activation rows on compute capability / 10.

    Chosen by what compiles without spills in at most 168 registers. From 9.0 to 10.3 the tensor cores
    read operands from shared memory, which frees registers for wider steps.
    """
    options = {"GROUP": 8, "num_stages": 3}
    if rows <= 16:
        return {"BM": 16, "BN": 64, "BK": 128, "num_warps": 4, **options}
    asynchronous = 90 <= capability < 120
    if rows <= 64:
        return {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4 if asynchronous else 8, **options}
    return {"BM": 128, "BN": 128, "BK": 64 if asynchronous else 32, "num_warps": 8, **options}


def w4a4_tile() -> dict[str, int]:
    """Tile and launch options of the block-scaled GEMM."""
    return {"BM": 128, "BN": 128, "BK": 128, "num_warps": 8, "num_stages": 3}


def _capability() -> tuple[int, int] | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability()


def _needs(least: tuple[int, int], what: str) -> str | None:
    found = _capability()
    if found is None:
        return f"{what} needs an NVIDIA GPU, and torch sees none."
    if found < least:
        return f"{what} needs compute capability {least[0]}.{least[1]}; this GPU has {found[0]}.{found[1]}."
    return None


def _triton_needs(least: tuple[int, int], what: str) -> Callable[[], str | None]:
    return lambda: optional_triton.MISSING or _needs(least, what)


def _scaled_mm_supported() -> str | None:
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm."
    return _needs((10, 0), "FP4 matrix multiplication")


def _call_rows(x: torch.Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def a16w4(
    x: torch.Tensor,
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gemv: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Launch the weight-only kernel: `x` [M, K] with unit inner stride; returns [M, N] in `dtype`, or x's."""
    (m, k), n, blocks = x.shape, codes.shape[0], block_scales.shape[1]
    y = torch.empty(m, n, dtype=dtype or x.dtype, device=x.device)
    if not y.numel():
        return y
    scales, has_bias = block_scales.view(torch.uint8), bias is not None
    bias = y if bias is None else bias
    if gemv:
        tile = gemv_tile()
        nvfp4_triton.gemv[(-(-n // tile["BN"]), m)](
            x, codes, scales, global_scale, bias, y, n, k, blocks, x.stride(0), n, HAS_BIAS=has_bias, **tile
        )
    else:
        major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
        tile = gemm_tile(m, 10 * major + minor)
        nvfp4_triton.gemm[(-(-m // tile["BM"]) * -(-n // tile["BN"]),)](
            x,
            codes,
            scales,
            global_scale,
            bias,
            y,
            m,
            n,
            k,
            blocks,
            x.stride(0),
            n,
            HAS_BIAS=has_bias,
            **tile,
        )
    return y


def scaled_mm(
    a: NVFP4Weight, codes: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`a` [M, K] times a weight [N, K] transposed on the FP4 tensor cores: [M, N] in `dtype`.

    codes: uint8 [N, K/2]; scales: E4M3, swizzled with zero padding; global_scale: fp32 []. N must be a
    multiple of 16 and K of 32.
    """
    from torch.nn.functional import ScalingType, SwizzleType
    from torch.nn.functional import scaled_mm as product

    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    layout = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    return product(
        a.codes.view(torch.float4_e2m1fn_x2),
        codes.view(torch.float4_e2m1fn_x2).t(),
        scale_a=[swizzle(a.block_scales), a.global_scale],
        scale_recipe_a=recipe,
        scale_b=[scales, global_scale],
        scale_recipe_b=recipe,
        swizzle_a=layout,
        swizzle_b=layout,
        output_dtype=dtype,
    )


def rounded(
    x: torch.Tensor,
    codes: torch.Tensor,
    block_scales: torch.Tensor,
    global_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """W4A4 without FP4 tensor cores: `x` [..., K] rounded to NVFP4, then the A16W4 kernels; returns [M, N].

    A code times its block's scale has six significant bits and is at most 2688: exact in fp16, whatever x is.
    """
    a = _quantized_input(x, input_scale)
    blocks = decode_e2m1(unpack(a.codes)).unflatten(-1, (-1, BLOCK))
    values = (blocks * a.block_scales.float().unsqueeze(-1)).flatten(-2).to(torch.float16)
    both = global_scale.reshape(()) * a.global_scale
    return a16w4(values, codes, block_scales, both, bias, gemv=values.shape[0] <= GEMV_ROWS, dtype=x.dtype)


def _quantized_input(x: torch.Tensor, input_scale: torch.Tensor | None) -> NVFP4Weight:
    amax = None if input_scale is None else input_scale.reshape(()) * 2688.0
    return quantize(x.reshape(-1, x.shape[-1]), amax=amax, nonfinite="propagate")


def register(op: Op, well_formed: Callable[..., str | None]) -> None:
    """Add the providers to `op`. well_formed: why a call's tensors do not fit the kernels, or None."""

    def w4a4_accepts(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
        if activations != "nvfp4":
            return f'It multiplies NVFP4 activations; this call asks for activations="{activations}".'
        if codes.shape[0] % 16 or codes.shape[1] % 16:
            given = f"N={codes.shape[0]}, K={codes.shape[1] * 2}"
            return f"The hardware wants N in multiples of 16 and K of 32; this weight has {given}."
        return well_formed(x, codes, block_scales, global_scale, input_scale, bias, activations)

    @op.provider("scaled_mm", device="cuda", supported=_scaled_mm_supported, supports_args=w4a4_accepts)
    def _(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
        scales = derived("swizzled", swizzle, block_scales).view(torch.float8_e4m3fn)
        y = scaled_mm(_quantized_input(x, input_scale), codes, scales, global_scale.reshape(()), x.dtype)
        y = y if bias is None else y + bias  # the product takes no bias with fp32 output
        return y.view(*x.shape[:-1], codes.shape[0])

    @op.provider(
        "triton_w4a4",
        device="cuda",
        supported=_triton_needs((10, 0), "Triton's block-scaled FP4 product"),
        supports_args=w4a4_accepts,
    )
    def _(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
        a = _quantized_input(x, input_scale)
        m, n = a.codes.shape[0], codes.shape[0]
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        tile = w4a4_tile()
        if y.numel():
            nvfp4_triton.gemm_w4a4[(-(-m // tile["BM"]), -(-n // tile["BN"]))](
                a.codes,
                a.block_scales,
                codes,
                block_scales.view(torch.float8_e4m3fn),
                a.global_scale * global_scale.reshape(()),
                y if bias is None else bias,
                y,
                m,
                n,
                codes.shape[1] * 2,
                codes.shape[1] * 2 // BLOCK,
                n,
                HAS_BIAS=bias is not None,
                **tile,
            )
        return y.view(*x.shape[:-1], n)

    def rounded_accepts(
        x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"
    ):
        if activations != "nvfp4":
            return f'It multiplies NVFP4 activations; this call asks for activations="{activations}".'
        return well_formed(x, codes, block_scales, global_scale, input_scale, bias, activations)

    @op.provider(
        "triton_rounded",
        device="cuda",
        supported=_triton_needs((8, 0), "The A16W4 kernel"),
        supports_args=rounded_accepts,
    )
    def _(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
        y = rounded(x, codes, block_scales, global_scale, input_scale, bias)
        return y.view(*x.shape[:-1], codes.shape[0])

    def exact_accepts(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
        if activations != "exact":
            return f'It keeps activations unrounded; this call asks for activations="{activations}".'
        return well_formed(x, codes, block_scales, global_scale, input_scale, bias, activations)

    def gemv_accepts(x, *rest):
        if _call_rows(x) > GEMV_ROWS:
            return f"It is for at most {GEMV_ROWS} rows; this call has {_call_rows(x)}."
        return exact_accepts(x, *rest)

    def gemm_accepts(x, *rest):
        if x.dtype == torch.float32:
            return "The tensor cores would round fp32 activations; it takes fp16 and bf16."
        return exact_accepts(x, *rest)

    def launch(gemv: bool) -> Callable[..., torch.Tensor]:
        def run(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
            rows = x.reshape(-1, x.shape[-1])
            rows = rows if rows.stride(-1) == 1 else rows.contiguous()
            y = a16w4(rows, codes, block_scales, global_scale, bias, gemv=gemv)
            return y.view(*x.shape[:-1], codes.shape[0])

        return run

    least = _triton_needs((8, 0), "The A16W4 kernel")
    op.provider("triton_gemv", device="cuda", supported=least, supports_args=gemv_accepts)(launch(True))
    op.provider("triton_gemm", device="cuda", supported=least, supports_args=gemm_accepts)(launch(False))
