"""A linear layer with 2-, 3-, 4- or 8-bit integer weights and full-precision activations.

`thresher::wna16_linear` computes x W^T + bias with W[n, k] = (code[n, k] - zero) * scale, the scale and
zero point being those of row n and of the group that column k falls in. Codes are stored as in
`thresher.formats.bitpack`, which is also how compressed-tensors stores them: nothing is repacked at load time.
"""

from __future__ import annotations

import functools

import torch
from torch import fx

from thresher.errors import ArgumentError
from thresher.formats import bitpack
from thresher.graph.nodes import argument, value
from thresher.ops import Sample, define
from thresher.pricing import LinearRate, Prices, dtype_of

from .plain import PLAIN

BITS = (2, 3, 4, 8)
GROUPS = (-1, 32, 64, 128)

# fp32 differs from the reference by the order of a sum; half types by the rounding of the result, and on
# a GPU also by the rounding of each dequantised weight.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def check(x, codes, scales, zeros, bias, bits: int, group_size: int) -> None:
    """Raise ArgumentError unless the arguments fit together. Reads metadata only."""
    if bits not in BITS:
        raise ArgumentError("bits", bits, "2, 3, 4 or 8", "Quantize the weight to one of those widths.")
    if not x.is_floating_point() or x.dim() < 1 or not x.shape[-1]:
        raise ArgumentError(
            "x",
            f"{x.dtype} {tuple(x.shape)}",
            "floating [..., in_features], one or more",
            "Convert it first.",
        )
    inputs = x.shape[-1]
    if group_size not in GROUPS or (group_size > 0 and inputs % group_size):
        raise ArgumentError(
            "group_size",
            group_size,
            f"-1 (one group a row), or 32, 64 or 128 where it divides in_features {inputs}",
            "Choose a group that divides, or -1.",
        )
    width = bitpack.words(inputs, bits)
    if codes.dtype != torch.int32 or codes.dim() != 2 or codes.shape[1] != width:
        raise ArgumentError(
            "codes",
            f"{codes.dtype} {tuple(codes.shape)}",
            f"int32 [out_features, {width}] for {inputs} inputs of {bits} bits",
            "Pack them with thresher.formats.bitpack.pack.",
        )
    outputs = codes.shape[0]
    grid = (outputs, 1 if group_size < 0 else inputs // group_size)
    if tuple(scales.shape) != grid or not scales.is_floating_point():
        raise ArgumentError(
            "scales", f"{scales.dtype} {tuple(scales.shape)}", f"floating {grid}", "One a group."
        )
    if zeros is not None and (tuple(zeros.shape) != grid or zeros.dtype != torch.uint8):
        raise ArgumentError(
            "zeros",
            f"{zeros.dtype} {tuple(zeros.shape)}",
            f"uint8 {grid}, or None for {1 << (bits - 1)}",
            "One a group.",
        )
    if bias is not None and (tuple(bias.shape) != (outputs,) or not bias.is_floating_point()):
        given = f"{bias.dtype} {tuple(bias.shape)}"
        raise ArgumentError("bias", given, f"floating [{outputs}]", "One an output.")


def dequantize(
    codes, scales, zeros, bits: int, inputs: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[out_features, inputs] in `dtype`, from codes and parameters laid out as for the operator."""
    values = bitpack.unpack(codes, bits, inputs).to(dtype)
    groups = max(scales.shape[1], 1)
    values = values.reshape(codes.shape[0], groups, inputs // groups)
    zero = float(1 << (bits - 1)) if zeros is None else zeros.to(dtype)[..., None]
    return ((values - zero) * scales.to(dtype)[..., None]).reshape(codes.shape[0], inputs)


def _fake(x, codes, scales, zeros, bias, bits, group_size):
    check(x, codes, scales, zeros, bias, bits, group_size)
    return torch.empty((*x.shape[:-1], codes.shape[0]), dtype=x.dtype, device=x.device)


def _sample(make, device, dtype, label, lead, outputs, inputs, bits, group, zeros, bias, scale_dtype):
    groups = 1 if group < 0 else inputs // group
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=make)
    scales = (torch.rand(outputs, groups, generator=make) + 0.5) / (1 << bits)
    zero = torch.randint(0, 1 << bits, (outputs, groups), generator=make, dtype=torch.uint8)
    args = (
        torch.randn(*lead, inputs, generator=make).to(device, dtype),
        bitpack.pack(codes, bits).to(device),
        scales.to(device, scale_dtype),
        zero.to(device) if zeros else None,
        torch.randn(outputs, generator=make).to(device, dtype) if bias else None,
        bits,
        group,
    )
    return Sample(label, args)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    cases = [  # label, leading shape, outputs, inputs, bits, group, zeros, bias, dtype of the scales
        *((f"{b} bits, one row", (1,), 48, 128, b, 64, False, True, f32) for b in BITS),
        *((f"{b} bits, per channel, odd tails", (3,), 13, 77, b, -1, True, False, f32) for b in BITS),
        ("group 32, zero points", (1, 5), 20, 96, 3, 32, True, True, bf16),
        ("fifteen rows, group 128", (15,), 33, 256, 4, 128, True, False, f16),
        ("a batch of tokens", (2, 19), 130, 192, 3, 64, True, True, f32),
        ("one output, three inputs", (2,), 1, 3, 4, -1, False, False, f32),
        ("no rows", (0,), 8, 32, 4, 32, False, True, f32),
        ("a vector", (), 9, 40, 8, -1, True, False, f32),
    ]
    if dtype != torch.float32:
        cases = [cases[1], cases[2], cases[9], cases[10]]
    return [_sample(make, device, dtype, *case) for case in cases]


def _price(model: Prices, node: fx.Node) -> float:
    """A product that reads codes and scales, as many bits for each weight."""
    x, scales, bits = node.args[0], argument(node, "scales"), argument(node, "bits")
    inputs = model.size(value(x).shape[-1])
    weights = inputs * model.size(value(node).shape[-1])
    stored = bits + 32 * model.numel(scales) / max(weights, 1)
    rows = model.numel(x) / max(inputs, 1)
    return model.linear(rows, weights, dtype_of(x), f"wna16_linear.{bits}", bits=stored)


def _rate(bits: int) -> LinearRate:
    def weight(side: int) -> tuple[torch.Tensor, ...]:
        codes = torch.randint(0, 1 << 30, (side, bitpack.words(side, bits)), dtype=torch.int32)
        return codes, torch.rand(side, side // 64)

    def run(bits: int, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.ops.thresher.wna16_linear(x, codes, scales, None, None, bits, 64)

    return LinearRate(f"wna16_linear.{bits}", weight, functools.partial(run, bits))


@define(
    "wna16_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias,"
    " int bits, int group_size) -> Tensor",
    fake=_fake,
    inputs=_samples,
    tolerance=TOLERANCE,
    providers=("cpu_cpp", "triton_gemv", "triton_gemm"),
    price=_price,
    plain=PLAIN,
    rates=[_rate(bits) for bits in (3, 4, 8)],
    check=check,
)
def wna16_linear(x, codes, scales, zeros, bias, bits, group_size):
    """x W^T + bias, W dequantised from low-bit codes; accumulated in at least fp32, returned in x's dtype.

    x: floating [..., K]. codes: int32 [N, words(K, bits)]. scales: floating [N, G]; zeros: uint8 [N, G], or
    None for the symmetric zero point 2 ** (bits - 1). bias: [N] or None. group_size: 32, 64 or 128 columns
    share a scale (it divides K), or -1 for one scale a row.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) @ dequantize(codes, scales, zeros, bits, x.shape[-1], wide).t()
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)
