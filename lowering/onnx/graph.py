"""Edits of an exported ONNX graph: true 4-bit types, fusions, readable names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleSet, rewrite
from onnxscript.rewriter.rules.fusion._rms_normalization import RmsNormFusion

from .weights import Stored


class _RmsNorm(RmsNormFusion):
    """The fusion of RMS norms, for scales of another type than the input too: ONNX's inference of types gives the result
    the input's type, and the model's the scale's, so the input takes the scale's before."""

    def rewrite(self, op: Any, x: Any, scale: Any, epsilon: Any, **rest: Any) -> Any:
        if x.dtype != scale.dtype:
            x = op.Cast(x, to=scale.dtype)
        return super().rewrite(op, x, scale, epsilon, **rest)


_RMS_NORMS = RewriteRuleSet([_RmsNorm.rule(f"rms_norm_{order}", mul_order=order) for order in (True, False)])


def restore_types(model: ir.Model, stored: Mapping[str, Stored]) -> None:
    """Give weights held as bytes their 4-bit type and shape again."""
    for name, kind in stored.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        dtype = ir.DataType[kind.dtype]
        packed = np.ascontiguousarray(value.const_value.numpy()).reshape(-1)
        value.const_value = ir.PackedTensor(packed, dtype, shape=ir.Shape(kind.shape), name=name)
        value.dtype, value.shape = dtype, ir.Shape(kind.shape)


def tidy(model: ir.Model) -> None:
    """Fold constants, share equal nodes, and fuse RMS norms. Rotary embeddings stay spelled out: the fused
    operator wants tables as long as the batch, and models give one for all rows."""
    optimizer.optimize_ir(model, onnx_shape_inference=True)
    if model.opset_imports.get("", 0) >= 23:
        rewrite(model, pattern_rewrite_rules=_RMS_NORMS)
    model.graph.sort()


def rename_initializers(model: ir.Model, names: Mapping[str, str]) -> None:
    """Call weights by their names in the model."""
    taken: set[str] = set()
    for old in list(model.graph.initializers):
        value = model.graph.initializers.pop(old)
        name = base = names.get(old, old)
        number = 1
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        model.graph.initializers[name] = value


def weights_of_products(model: ir.Model) -> dict[str, str]:
    """The weight that each matrix product multiplies by, by the product's node; before constants are folded."""
    through = {"Transpose", "Reshape", "Cast", "Unsqueeze", "Squeeze", "DequantizeLinear", "Identity"}
    found: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or node.name is None:
            continue
        for operand in node.inputs[:2]:
            while (
                operand is not None and (maker := operand.producer()) is not None and maker.op_type in through
            ):
                operand = maker.inputs[0]
            name = None if operand is None else operand.name
            if name is not None and name in model.graph.initializers:
                found[node.name] = name
    return found


def label_sizes(model: Any, packed_body: bool) -> None:
    """Call the dimensions of inputs and outputs batch and sequence (tokens in a body) where that is what they are."""
    names: dict[str, str] = {}
    for given in model.graph.inputs:
        for index, size in enumerate(given.shape):
            if isinstance(size, ir.SymbolicDim) and size.value not in names:
                if not packed_body:
                    known = (
                        ("batch", "sequence")[index]
                        if index < 2 and not len(names) > 1
                        else f"{given.name}_{index}"
                    )
                else:
                    known = "offsets" if given.name == "cu_seqlens" else "tokens"
                names[str(size.value)] = known if known not in names.values() else f"{known}_{len(names)}"
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [names.get(str(s.value), s) if isinstance(s, ir.SymbolicDim) else s for s in value.shape]
            )
