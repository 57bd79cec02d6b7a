"""Linears over NVFP4 weights (`nvfp4_linear`): two DequantizeLinear over FLOAT4E2M1, twice the values in int8 where
a runtime does not read that type, or TensorRT's dynamic quantization of the activations too."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.formats import nvfp4 as nvfp4_format
from thresher.graph.nodes import argument, value
from thresher.kernels.nvfp4.plain import round_activations

from ..target import DECOMPOSED, FALLBACK, NATIVE, REFUSED, Runtime
from .weights import Weights, symbolic

FLOAT8E4M3FN, FLOAT4E2M1 = 17, 23  # numbers of onnx.TensorProto.DataType
_BLOCK = nvfp4_format.BLOCK


_OPTIONS = ("input_scale", "bias", "activations")


def account(node: fx.Node, runtime: Runtime) -> tuple[str, str]:
    """What becomes of one `nvfp4_linear` node."""
    if "fp4_activations" in runtime.low_bit:
        if argument(node, "activations") != "nvfp4":
            why = "TensorRT expands weight-only FP4 to half before the product, so the audit would refuse it."
            return REFUSED, why
        if argument(node, "input_scale") is None:
            why = "TensorRT quantizes activations with a fixed tensor scale, and none was calibrated."
            return REFUSED, why
        return NATIVE, ""
    if "fp4" in runtime.low_bit:
        return (
            DECOMPOSED,
            "Two DequantizeLinear over FLOAT4E2M1 codes, as the standard's two-level scaling.",
        )
    return (
        FALLBACK,
        "ONNX Runtime reads no FLOAT4E2M1: codes are stored as int8, exact, 8.5 bits and not 4.5.",
    )


def put(node: fx.Node, weights: Weights) -> None:
    """Replace one `nvfp4_linear` node."""
    given = {name: argument(node, name) for name in _OPTIONS}
    x, codes_node, scales_node, global_node = node.args[:4]
    codes = nvfp4_format.unpack(weights.tensor(codes_node))
    scales = weights.tensor(scales_node).view(torch.float8_e4m3fn)
    scale = weights.tensor(global_node).reshape(())
    if "fp4_activations" in weights.runtime.low_bit:
        _dynamic(node, weights, codes, scales, scale, **given)
        return
    fp4 = "fp4" in weights.runtime.low_bit
    held = (
        _two_levels(node, weights, codes, scales, scale, torch.float32)
        if fp4
        else _doubled(node, weights, codes, scales, scale)
    )
    outputs, columns = codes.shape
    activations = given["activations"]

    def form(x: Any, bias: Any, input_scale: Any, *held: Any) -> Any:
        rows, factor = round_activations(x, activations, input_scale)
        w = _dequantized(held, outputs, columns, fp4, torch.float32)
        y = torch.matmul(rows, w.t())
        y = y if activations != "nvfp4" else y * factor
        return (y if bias is None else y + bias.float()).to(x.dtype)

    weights.replace(node, form, [x, given["bias"], given["input_scale"], *held])


def _dynamic(
    node: fx.Node,
    weights: Weights,
    codes: Any,
    scales: Any,
    scale: Any,
    input_scale: Any,
    bias: Any,
    activations: str,
) -> None:
    x = node.args[0]
    dtype = value(x).dtype
    held = _two_levels(node, weights, codes, scales, scale, dtype)
    outputs, columns = codes.shape
    if activations in ("int8", "int16"):
        weights.note(
            f"{node.name}: activations={activations!r} is a CPU mode; the engine takes them as they are."
        )
    if activations == "nvfp4":
        if input_scale is None:
            raise ValueError(
                "NVFP4 activations with the scale of each call's own maximum; TensorRT's dynamic quantization "
                "needs a fixed tensor scale. Calibrate the model so that input_scale is set"
            )
        weights.functions.add("TRT_FP4DynamicQuantize")
        held = [
            weights.keep(node, "input_scale", weights.tensor(input_scale).reshape(()).to(dtype)),
            *held,
        ]

    def form(x: Any, bias: Any, *held: Any) -> Any:
        if activations == "nvfp4":
            given, *held = held  # type: ignore[assignment]
            blocks = (*x.shape[:-1], columns // _BLOCK)
            pairs = (
                *x.shape[:-1],
                columns // 2,
            )  # torch counts 4-bit floats by the byte; the exporter doubles this
            axis: dict[str, Any] = {"axis": -1, "block_size": _BLOCK}
            q, s = torch.onnx.ops.symbolic_multi_out(
                "trt::TRT_FP4DynamicQuantize", [x, given], {**axis, "scale_type": FLOAT8E4M3FN},
                dtypes=(FLOAT4E2M1, FLOAT8E4M3FN), shapes=(pairs, blocks), version=1,
            )  # fmt: skip
            s = symbolic("DequantizeLinear", [s, given], dtype=x.dtype, shape=blocks)
            x = symbolic("DequantizeLinear", [q, s], axis, dtype=x.dtype, shape=x.shape)
        y = torch.matmul(x, _dequantized(held, outputs, columns, True, x.dtype).t())
        return y if bias is None else y + bias

    weights.replace(node, form, [x, bias, *held])


def _two_levels(
    node: fx.Node, weights: Weights, codes: Any, scales: Any, scale: Any, dtype: Any
) -> list[fx.Node]:
    """FLOAT4E2M1 codes [N, K], FLOAT8E4M3FN scales [N, K / 16] and the tensor scale: two DequantizeLinear."""
    return [
        weights.hold(node, "codes", codes, "FLOAT4E2M1"),
        weights.keep(node, "scales", scales),
        weights.keep(node, "scale", scale.to(dtype)),
    ]


def _doubled(node: fx.Node, weights: Weights, codes: Any, scales: Any, scale: Any) -> list[fx.Node]:
    """Twice the E2M1 values are integers: int8 [N, K] and fp32 scales [N, K / 16], exact in any runtime."""
    twice = (nvfp4_format.decode_e2m1(codes) * 2).to(torch.int8)
    weights.note(
        "NVFP4 weights are stored as int8 (twice their value), exact, since ONNX Runtime's CPU kernels do not "
        "read FLOAT4E2M1: 8.5 bits a weight and not 4.5."
    )
    return [
        weights.keep(node, "twice", twice),
        weights.keep(node, "half_scales", scales.float() * (scale * 0.5)),
    ]


def _dequantized(held: Any, outputs: int, columns: int, fp4: bool, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] from what `_two_levels` (fp4) or `_doubled` stored; for use while tracing."""
    blocks: dict[str, Any] = {"axis": 1, "block_size": _BLOCK}
    if not fp4:
        return symbolic("DequantizeLinear", list(held), blocks, dtype=dtype, shape=(outputs, columns))
    codes, scales, scale = held
    wide = symbolic("DequantizeLinear", [scales, scale], dtype=dtype, shape=(outputs, columns // _BLOCK))
    return symbolic("DequantizeLinear", [codes, wide], blocks, dtype=dtype, shape=(outputs, columns))
