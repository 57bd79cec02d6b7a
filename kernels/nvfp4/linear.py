"""`thresher::nvfp4_linear`: y = x W^T + bias with W in NVFP4 (4.5 bits a weight).

How the activations enter is an explicit argument, `activations`:

    exact   as they are (weight-only quantization), fp32 accumulation
    int16   rounded to 16-bit integers with one scale a block of 16: about 2e-5 relative error
    int8    the same with 8 bits: about 5e-3
    nvfp4   rounded to NVFP4 too (W4A4): with the fixed tensor scale `input_scale`, or without one
            with the scale of this call's largest magnitude. Beyond 2688 * input_scale they saturate.

The integer modes exist because CPUs multiply bytes several times faster than floats; they are far
finer than the weights' own 9.5 % rounding error. They permit rounding and do not ask for it: for 16-bit
activations a provider may keep them as they are where that is faster. The tensor scale multiplies the fp32 accumulator:
code * block scale is exact in bf16 and fp16, the product with the tensor scale is not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import fx

from thresher.errors import ArgumentError, unknown_key
from thresher.formats.nvfp4 import BLOCK, decode_e2m1, pad_blocks, padded, unpack
from thresher.graph.nodes import argument, value
from thresher.ops import Sample, define
from thresher.pricing import LinearRate, Prices, dtype_of

from . import cpu as nvfp4_cpu
from . import cuda as nvfp4_cuda
from .plain import INT_LIMITS, PLAIN
from .quantize import MODES, SEARCHES, quantize

ACTIVATIONS = ("exact", "int16", "int8", "nvfp4")


def _values(codes: torch.Tensor, block_scales: torch.Tensor) -> torch.Tensor:
    """code * block scale, exact in fp32: [..., 16B]."""
    blocks = decode_e2m1(unpack(codes)).unflatten(-1, (-1, BLOCK))
    return (blocks * block_scales.view(torch.float8_e4m3fn).float().unsqueeze(-1)).flatten(-2)


def round_activations(
    x: torch.Tensor, activations: str, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [..., K] as it enters the product: fp32 values [..., 16B], and an fp32 factor for the result.

    A block of integers that holds NaN or infinity becomes NaN.
    """
    one = torch.ones((), device=x.device)
    if activations == "exact":
        return pad_blocks(x).float(), one
    if activations == "nvfp4":
        amax = None if input_scale is None else input_scale.reshape(()).float() * 2688.0
        q = quantize(x, amax=amax, nonfinite="propagate")
        return _values(q.codes, q.block_scales), q.global_scale
    blocks = pad_blocks(x).float().unflatten(-1, (-1, BLOCK))
    amax, limit = blocks.abs().amax(-1, keepdim=True), INT_LIMITS[activations]
    inverse = torch.full_like(amax, limit) / amax  # not `limit / amax`, which multiplies by a reciprocal
    inverse = torch.where(amax > 0, inverse.clamp(max=torch.finfo(torch.float32).max), 0.0)
    return ((blocks * inverse).round() * (amax / limit)).flatten(-2), one


def _misfit(x, codes, block_scales, global_scale, input_scale, bias, activations) -> ArgumentError | None:
    """What is wrong with a call's metadata, or None."""
    if activations not in ACTIVATIONS:
        return unknown_key("activations", activations, ACTIVATIONS)
    if x.dim() < 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        accepted = "float32, bfloat16 or float16 [..., in_features]"
        return ArgumentError("x", f"{x.dtype} {tuple(x.shape)}", accepted, "Convert it first.")
    half = padded(x.shape[-1]) // 2
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != half:
        accepted = f"uint8 [out_features, {half}] for {x.shape[-1]} input features (padded to 16)"
        given = f"{codes.dtype} {tuple(codes.shape)}"
        return ArgumentError("codes", given, accepted, "Pass what kernels.nvfp4_quantize.quantize returned.")
    scales = (codes.shape[0], half // 8)
    if block_scales.dtype not in (torch.float8_e4m3fn, torch.uint8) or tuple(block_scales.shape) != scales:
        given = f"{block_scales.dtype} {tuple(block_scales.shape)}"
        fix = "Undo a swizzle with kernels.nvfp4_format.unswizzle."
        return ArgumentError("block_scales", given, f"float8_e4m3fn (or its bytes, uint8) {scales}", fix)
    for name, scale in (("global_scale", global_scale), ("input_scale", input_scale)):
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            given = f"{scale.dtype} {tuple(scale.shape)}"
            return ArgumentError(name, given, "one float32 value", "The multiplier, not its reciprocal.")
    if input_scale is not None and activations != "nvfp4":
        fix = 'Leave it out, or pass activations="nvfp4".'
        return ArgumentError("input_scale", f"a tensor with activations={activations!r}", "None", fix)
    if bias is not None and (tuple(bias.shape) != (codes.shape[0],) or not bias.is_floating_point()):
        fix, given = "Give one value an output feature.", f"{bias.dtype} {tuple(bias.shape)}"
        return ArgumentError("bias", given, f"floating ({codes.shape[0]},)", fix)
    return None


def check(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact") -> None:
    """Raise ArgumentError unless the arguments fit together. Reads metadata only."""
    misfit = _misfit(x, codes, block_scales, global_scale, input_scale, bias, activations)
    if misfit is not None:
        raise misfit


def _fake(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
    check(x, codes, block_scales, global_scale, input_scale, bias, activations)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _inputs(device: torch.device, dtype: torch.dtype) -> Sequence[Sample]:
    generator = torch.Generator().manual_seed(0)

    def call(label, rows, k, n, bias=False, activations="exact", static=False):
        x = torch.randn(*rows, k, generator=generator).to(dtype)
        q = quantize(torch.randn(n, k, generator=generator) * 0.02)
        b = torch.randn(n, generator=generator).to(dtype) if bias else None
        scale = torch.tensor(4.0 / 2688) if static else None
        scales = q.block_scales.view(torch.uint8)  # opcheck cannot compare fp8 tensors
        args = (x, q.codes, scales, q.global_scale, scale, b, activations)
        return Sample(label, tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args))

    samples = [
        call("one row", (1,), 256, 24),
        call("batched, K not a multiple of 16, tail group", (2, 3), 200, 13, bias=True),
        call("many rows", (19,), 272, 33),
        call("no rows", (0,), 64, 16, bias=True),
        call("vector", (), 48, 16),
        call("static input scale", (5,), 96, 32, activations="nvfp4", static=True),
    ]
    if dtype != torch.float32:  # the rounding modes begin by widening to fp32
        return samples[:4]
    samples += [call(f"{a} activations", (7,), 328, 20, True, a) for a in ("int16", "int8", "nvfp4")]
    return samples


def _price(model: Prices, node: fx.Node) -> float:
    """A product that reads 4.5 bits a weight; on hardware with FP4 products, in those where the activations are too."""
    x, mode = node.args[0], argument(node, "activations")
    inputs = model.size(value(x).shape[-1])
    weights = inputs * model.size(value(node).shape[-1])
    dtype = "nvfp4" if mode == "nvfp4" and "nvfp4" in model.device.flops else dtype_of(x)
    rows = model.numel(x) / max(inputs, 1)
    return model.linear(rows, weights, dtype, f"nvfp4_linear.{mode}", bits=4.5)


def _rate(mode: str) -> LinearRate:
    def weight(side: int) -> tuple[torch.Tensor, ...]:
        codes = torch.randint(0, 256, (side, side // 2), dtype=torch.uint8)
        return codes, torch.rand(side, side // 16).add(0.5).to(torch.float8_e4m3fn), torch.ones(())

    def run(mode: str, x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.thresher.nvfp4_linear(x, *weight, None, None, mode)

    return LinearRate(f"nvfp4_linear.{mode}", weight, functools.partial(run, mode))


@define(
    "nvfp4_linear(Tensor x, Tensor codes, Tensor block_scales, Tensor global_scale, "
    'Tensor? input_scale=None, Tensor? bias=None, str activations="exact") -> Tensor',
    fake=_fake,
    inputs=_inputs,
    # fp32: another order of summation. bf16, fp16: the same, where it moves a result across a rounding
    # boundary of the output; at most one unit in the last place.
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    providers=("cpu_cpp", "scaled_mm", "triton_w4a4", "triton_rounded", "triton_gemv", "triton_gemm"),
    price=_price,
    plain=PLAIN,
    rates=[_rate(mode) for mode in ("exact", "int16", "int8")],
    check=check,
)
def nvfp4_linear(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
    """x [..., K]; codes uint8 [N, 8B], B = ceil(K/16); block_scales E4M3 [N, B],
    as float8_e4m3fn or its bytes; global_scale fp32 [].

    input_scale: fp32 [], only with activations="nvfp4"; bias [N]. Returns [..., N] in x's dtype.
    """
    rows, factor = round_activations(x, activations, input_scale)
    y = rows @ _values(codes, block_scales).t() * (global_scale.reshape(()) * factor)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _in_place(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
    for name, tensor in (("codes", codes), ("block_scales", block_scales)):
        if not tensor.is_contiguous():
            return f"{name} is not contiguous; the kernel reads it in place and would have to copy it."
    return None


@nvfp4_linear.provider("cpu_cpp", device="cpu", supported=nvfp4_cpu.unavailable, supports_args=_in_place)
def _cpu(x, codes, block_scales, global_scale, input_scale=None, bias=None, activations="exact"):
    rows, alpha = x.reshape(-1, x.shape[-1]), global_scale
    if activations == "nvfp4":
        rows, factor = round_activations(rows, activations, input_scale)
        alpha, activations = global_scale.reshape(()) * factor, "exact"
    y = nvfp4_cpu.linear(rows, codes, block_scales, alpha, bias, activations)
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


nvfp4_cuda.register(nvfp4_linear, _in_place)


def _quantize_inputs(device: torch.device, dtype: torch.dtype) -> Sequence[Sample]:
    generator = torch.Generator().manual_seed(0)

    def call(label, n, k, mode="thresher", search="none"):
        weight = torch.randn(n, k, generator=generator).to(device, dtype)
        return Sample(label, (weight, mode, search))

    return [
        call("plain", 5, 64),
        call("K not a multiple of 16", 3, 40, "modelopt"),
        call("four over six", 4, 32, search="four_over_six"),
        call("scale search", 4, 32, search="mse"),
        call("empty", 0, 32),
    ]


def _check_weight(weight, mode="thresher", search="none") -> None:
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        given = f"{weight.dtype} {tuple(weight.shape)}"
        raise ArgumentError("weight", given, "float32, bfloat16 or float16 [N, K]", "Convert it first.")
    if mode not in MODES:
        raise unknown_key("mode", mode, MODES)
    if search not in SEARCHES:
        raise unknown_key("search", search, SEARCHES)


def _quantize_fake(weight, mode="thresher", search="none"):
    n, blocks = weight.shape[0], -(-weight.shape[1] // BLOCK)
    codes = weight.new_empty((n, blocks * 8), dtype=torch.uint8)
    return codes, weight.new_empty((n, blocks), dtype=torch.uint8), weight.new_empty((), dtype=torch.float32)


@define(
    'nvfp4_quantize(Tensor weight, str mode="thresher", str search="none") -> (Tensor, Tensor, Tensor)',
    fake=_quantize_fake,
    inputs=_quantize_inputs,
    tolerance={torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 0.0},  # bytes are equal or wrong
    plain="It packs weights and has no place in an exported graph.",
    check=_check_weight,
)
def nvfp4_quantize(weight, mode="thresher", search="none"):
    """weight [N, K] to what `nvfp4_linear` takes: codes uint8 [N, 8B], block scales as E4M3 bytes uint8
    [N, B], and the tensor scale fp32 []. mode, search: as in `nvfp4_quantize.quantize`.

    Raises ArgumentError for NaN or infinite weights.
    """
    q = quantize(weight.detach(), mode=mode, search=search, name="weight")
    return q.codes, q.block_scales.view(torch.uint8), q.global_scale
