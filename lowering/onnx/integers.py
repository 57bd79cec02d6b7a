"""Linears over integer weights (`wna16_linear`) as ONNX Runtime's MatMulNBits or a blocked DequantizeLinear."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.formats import bitpack
from thresher.graph.nodes import argument, value

from ..target import DECOMPOSED, NATIVE, Runtime
from .weights import Weights, symbolic


def account(node: fx.Node, runtime: Runtime) -> tuple[str, str]:
    """What becomes of one `wna16_linear` node, at the accuracy level that is fastest."""
    bits, group = (argument(node, n) for n in ("bits", "group_size"))
    reason = no_nbits(runtime, int(value(node.args[0]).shape[-1]), bits, group, 4)
    if reason is None:
        return NATIVE, ""
    if "nbits" in runtime.low_bit:
        return DECOMPOSED, f"DequantizeLinear and MatMul. {reason}"
    return DECOMPOSED, "A blocked DequantizeLinear and MatMul, which engines fuse into one product."


def put(node: fx.Node, weights: Weights) -> None:
    """Replace one `wna16_linear` node."""
    arguments: tuple[Any, ...] = node.args
    x, codes_node, scales_node, zeros_node, _, bits, group = arguments
    inputs = int(value(x).shape[-1])
    codes = bitpack.unpack(weights.tensor(codes_node), bits, inputs)
    scales = weights.tensor(scales_node)
    zeros = weights.tensor(zeros_node) if zeros_node is not None else None
    reason = no_nbits(weights.runtime, inputs, bits, group, weights.accuracy_level)
    if reason is None:
        _nbits(node, weights, codes, scales, zeros, bits, group)
        return
    if "nbits" in weights.runtime.low_bit:
        weights.note(f"{node.name}: a blocked DequantizeLinear and not MatMulNBits. {reason}")
    _blocked(node, weights, codes, scales, zeros, bits, group)


def no_nbits(runtime: Runtime, inputs: int, bits: int, group: int, accuracy_level: int) -> str | None:
    """Why a weight does not become MatMulNBits, or None."""
    if "nbits" not in runtime.low_bit:
        return "It is an operator of ONNX Runtime alone."
    if group < 0 and inputs % 32:
        return f"It needs blocks of at least 16, and {inputs} inputs have one scale a row that 32 does not divide."
    if bits in (2, 8) and accuracy_level != 4 and not runtime.gpu:
        return f"Its CPU kernel at {bits} bits with fp32 accumulation is over ten times slower than fp32."
    return None


def nbits(x: Any, held: Any, bias: Any, outputs: int, inputs: int, bits: int, block: int, level: int) -> Any:
    """One MatMulNBits over stored codes and scales, and the bias; for use while tracing."""
    shape = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
    attributes: dict[str, Any] = {**shape, "accuracy_level": level}
    y = symbolic(
        "com.microsoft::MatMulNBits",
        [x, *held],
        attributes,
        dtype=x.dtype,
        shape=(*x.shape[:-1], outputs),
        version=1,
    )
    return y if bias is None else y + bias


def _nbits(
    node: fx.Node, weights: Weights, codes: Any, scales: Any, zeros: Any, bits: int, group: int
) -> None:
    """com.microsoft::MatMulNBits: [N, blocks, bytes] codes, fp32 scales [N, blocks]."""
    outputs, inputs = codes.shape
    block = group if group > 0 else 32
    scales = scales.float() if group > 0 else scales.float().expand(-1, inputs // block)
    if zeros is None and bits == 3:
        zeros = torch.full((outputs, scales.shape[1]), 4, dtype=torch.uint8)
    if zeros is not None and group < 0:
        zeros = zeros.expand(-1, inputs // block)
    width = 4 if bits == 3 else bits  # three bits have no kernel; they are stored in four
    tensors = [_pack(codes.reshape(outputs, -1, block), width), scales.reshape(-1).contiguous()]
    if zeros is not None:
        tensors.append(_pack(_pad_to(zeros, 8 // width), width).reshape(-1))
    held = [weights.keep(node, f"part{i}", t) for i, t in enumerate(tensors)]
    level = weights.accuracy_level

    def form(x: Any, bias: Any, *held: Any) -> Any:
        return nbits(x, held, bias, outputs, inputs, width, block, level)

    weights.replace(node, form, [node.args[0], node.args[4], *held])


def _blocked(
    node: fx.Node, weights: Weights, codes: Any, scales: Any, zeros: Any, bits: int, group: int
) -> None:
    """MatMul of a blocked DequantizeLinear: [K, N] codes in INT4 or INT8, scales [K / group, N]."""
    x, bias = node.args[0], node.args[4]
    dtype = value(x).dtype
    name = "INT8" if bits == 8 else "INT4"
    if zeros is not None and bits >= 4:
        name, shift = f"U{name}", 0
    else:  # fewer bits, or symmetric: signed codes around zero
        shift = 1 << (bits - 1)
    stored = codes.int() - shift
    points = None if zeros is None or bits < 4 else zeros.t()
    if zeros is not None and bits < 4:
        stored = codes.int() - zeros.int().repeat_interleave(codes.shape[1] // zeros.shape[1], 1)
    scales = scales.to(dtype).t().contiguous() if group > 0 else scales.to(dtype).reshape(-1)
    held = [weights.hold(node, "codes", stored.t(), name), weights.keep(node, "scales", scales)]
    if points is not None:
        held.append(weights.hold(node, "zeros", points if group > 0 else points.reshape(-1), name))
    outputs, inputs = codes.shape
    attributes: dict[str, Any] = {"axis": 0, "block_size": group} if group > 0 else {"axis": 1}

    def form(x: Any, bias: Any, *held: Any) -> Any:
        w = symbolic("DequantizeLinear", list(held), attributes, dtype=x.dtype, shape=(inputs, outputs))
        y = torch.matmul(x, w)
        return y if bias is None else y + bias

    weights.replace(node, form, [x, bias, *held])


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] codes as bytes [..., n * bits / 8], the first in the lowest bits."""
    parts = codes.to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def _pad_to(codes: torch.Tensor, step: int) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % step))
