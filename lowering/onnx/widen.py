"""A bf16 model as one that computes in fp32, for ONNX Runtime on a CPU, which multiplies no bf16.

    MatMul(x, weight)      becomes   MatMul(x, Cast<to = FLOAT>(weight))      x and every other value in fp32

Large weights of products and tables stay in bf16 in the file, so that it is no larger than the model; ONNX Runtime widens
them once, when it opens the file. Casts to bf16 become casts to fp32: what the model rounds on its way is not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

_BF16, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_NAMES_A_TYPE = frozenset({"to", "dtype", "output_dtype", "softmax_precision", "stash_type", "precision"})
_READ_BEHIND_A_CAST = frozenset({"MatMul", "Gemm", "Gather", "Transpose", "Conv"})
_LARGE = 1024  # elements


def widen(model: ir.Model) -> bool:
    """Make every bf16 value of a model fp32, inputs and outputs too; whether there was any."""
    found = False
    for graph in _graphs(model):
        found |= _weights(graph)
        for value in _values(graph):
            if value.dtype == _BF16:
                value.dtype, found = _FP32, True
        for node in graph:
            for attribute in list(node.attributes.values()):
                new = _widened(attribute)
                if new is not None:
                    node.attributes[attribute.name], found = new, True
    return found


def _graphs(model: ir.Model) -> Iterator[Any]:
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.graph.subgraphs()


def _values(graph: Any) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _weights(graph: Any) -> bool:
    """Weights in fp32, or behind a cast to it; whether any was in bf16."""
    found = False
    for value in list(graph.initializers.values()):
        held = value.const_value
        if held is None or held.dtype != _BF16:
            continue
        found = True
        readers = {use.node.op_type for use in value.uses()}
        if held.size >= _LARGE and readers <= _READ_BEHIND_A_CAST and not value.is_graph_output():
            cast = ir.node("Cast", [value], {"to": _FP32.value}, name=f"{value.name}.widened")
            wide = cast.outputs[0]
            wide.name, wide.dtype, wide.shape = f"{value.name}.fp32", _FP32, value.shape
            value.dtype = _BF16
            value.replace_all_uses_with(wide)
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
        else:
            value.const_value, value.dtype = _tensor(held, value.name), _FP32
    return found


def _widened(attribute: Any) -> Any:
    """An attribute that names bf16 or holds numbers in it, in fp32; None for others."""
    if attribute.is_ref():
        return None
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
        return ir.AttrTensor(attribute.name, _tensor(attribute.value, attribute.value.name))
    if attribute.name in _NAMES_A_TYPE and attribute.type == ir.AttributeType.INT:
        return ir.AttrInt64(attribute.name, _FP32.value) if attribute.value == _BF16.value else None
    return None


def _tensor(held: Any, name: str | None) -> ir.TensorProtocol:
    return ir.tensor(held.numpy().astype(np.float32), name=name)
