"""Edits of an exported ONNX graph: true 4-bit types, fusions, readable names, and packing around a body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_ruleset

from thresher.layout import Gather, PackedLayout, Passed, PlanField, Scatter

from .onnx_forms import Stored


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
        rewrite(model, pattern_rewrite_rules=rms_normalization_ruleset)
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


class Build:
    """Adds nodes to a graph: `build("Gather", x, index, axis=0)` gives the node's value."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self._count = 0

    def __call__(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        values = [self.constant(i) if not isinstance(i, ir.Value) and i is not None else i for i in inputs]
        node = ir.node(op, values, attributes, num_outputs=outputs)
        self._count += 1
        node.name = f"pack_{self._count}_{op}"
        for i, out in enumerate(node.outputs):
            out.name = f"{node.name}_{i}"
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, numbers: Any) -> ir.Value:
        """An int64 initializer."""
        self._count += 1
        name = f"pack_{self._count}_constant"
        tensor = ir.tensor(np.asarray(numbers, dtype=np.int64), name=name)
        value = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
        )
        self.graph.initializers[name] = value
        return value

    def absorb(self, part: ir.Model, inputs: Sequence[ir.Value], prefix: str) -> list[ir.Value]:
        """Move a model's nodes into the graph, reading `inputs`; returns its outputs. Equal names of weights
        mean the same weight."""
        graph = part.graph
        mapping: dict[Any, Any] = dict(zip(graph.inputs, inputs, strict=True))
        for name, value in list(graph.initializers.items()):
            if name in self.graph.initializers:
                mapping[value] = self.graph.initializers[name]
            else:
                graph.initializers.pop(name)
                self.graph.initializers[name] = value
        outputs = [mapping.get(o, o) for o in graph.outputs]
        graph.outputs.clear()
        nodes = list(graph)
        for node in nodes:
            for index, read in enumerate(node.inputs):
                if read in mapping:
                    node.replace_input_with(index, mapping[read])
            for out in node.outputs:
                out.name = f"{prefix}.{out.name}"
            node.name = f"{prefix}.{node.name}"
        graph.remove(nodes)
        self.graph.extend(nodes)
        return outputs


class Packing:
    """The packing plan of one batch as ONNX nodes, from its padding mask [B, S]."""

    def __init__(self, build: Build, mask: ir.Value):
        self.build = build
        b = build
        shape = b("Shape", mask)
        self.batch, self.width = b("Gather", shape, [0], axis=0), b("Gather", shape, [1], axis=0)
        real = b("Cast", mask, to=ir.DataType.BOOL) if mask.dtype != ir.DataType.BOOL else mask
        flat = b("Reshape", real, [-1])
        self.idx = b("Squeeze", b("NonZero", flat), [0])
        self.rows = b("Div", self.idx, self.width)
        self.columns = b("Mod", self.idx, self.width)
        lengths = b("ReduceSum", b("Cast", real, to=ir.DataType.INT64), [1], keepdims=0)
        ends = b("CumSum", lengths, b("Squeeze", b.constant([0])))
        self.cu_seqlens = b("Cast", b("Concat", [0], ends, axis=0), to=ir.DataType.INT32)

    def gather(self, tensor: ir.Value, where: Gather, rank: int) -> ir.Value:
        """The real tokens of a padded tensor; see `layout.Gather`."""
        b, sequence = self.build, where.sequence
        if where.batch == sequence:
            return b("Gather", tensor, self.idx, axis=sequence)
        if where.batch is None:
            return b("Gather", tensor, self.columns, axis=sequence)
        order = [where.batch, sequence, *(d for d in range(rank) if d not in (where.batch, sequence))]
        moved = b("Transpose", tensor, perm=order)
        rest = b("Slice", b("Shape", moved), [2], [2**31], [0])
        # one row may stand for all, and one position for all of a row's
        full = b("Expand", moved, b("Concat", self.batch, self.width, rest, axis=0))
        flat = b("Reshape", full, b("Concat", [-1], rest, axis=0), allowzero=0)
        taken = b("Unsqueeze", b("Gather", flat, self.idx, axis=0), [0])
        return b("Transpose", taken, perm=[order.index(d) for d in range(rank)])

    def scatter(self, tensor: ir.Value, where: Scatter, rank: int) -> ir.Value:
        """A padded tensor, zero at pads; see `layout.Scatter`."""
        b = self.build
        joined = where.batch == where.sequence
        order = [where.sequence, *(d for d in range(rank) if d != where.sequence)]
        if not joined:
            order = [where.batch, *(d for d in order if d != where.batch)]
        moved = b("Transpose", tensor, perm=order)
        rest = b("Slice", b("Shape", moved), [1 if joined else 2], [2**31], [0])
        flat = moved if joined else b("Squeeze", moved, [0])
        positions = b("Mul", self.batch, self.width)
        zeros = b(
            "Expand", b("CastLike", b("Squeeze", b.constant([0])), flat), b("Concat", positions, rest, axis=0)
        )
        spread = b("ScatterND", zeros, b("Unsqueeze", self.idx, [1]), flat)
        if not joined:
            spread = b("Reshape", spread, b("Concat", self.batch, self.width, rest, axis=0), allowzero=1)
        return b("Transpose", spread, perm=[order.index(d) for d in range(rank)])


def pack_around(
    inputs: Sequence[ir.Value],
    layout: PackedLayout,
    body: ir.Model,
    fields: Sequence[Gather | PlanField | Passed],
    prologue: ir.Model | None,
    epilogue: ir.Model | None,
    ranks: Mapping[str, Sequence[int]],
    opset: Mapping[str, int],
) -> ir.Model:
    """One graph that takes padded tensors and gives padded ones, and computes real tokens in between.

    fields: where each of the body's inputs comes from, in their order. ranks: dimensions of the caller's
    inputs ("input"), and of the results of each part.
    """
    graph = ir.Graph(list(inputs), [], nodes=[], opset_imports=dict(opset), name="thresher")
    build = Build(graph)
    plan = Packing(build, inputs[layout.mask])
    sources: dict[str, Sequence[ir.Value]] = {"input": inputs, "prologue": [], "body": [], "epilogue": []}
    if prologue is not None:
        sources["prologue"] = build.absorb(prologue, inputs, "early")
    arguments = []
    for where in fields:
        if isinstance(where, PlanField):
            arguments.append(getattr(plan, where.name))
        elif isinstance(where, Passed):
            arguments.append(sources[where.origin][where.index])
        else:
            tensor = sources[where.origin][where.index]
            arguments.append(plan.gather(tensor, where, ranks[where.origin][where.index]))
    sources["body"] = build.absorb(body, arguments, "body")

    def fetch(where: Scatter | Passed) -> ir.Value:
        if isinstance(where, Passed):
            return sources[where.origin][where.index]
        return plan.scatter(sources["body"][where.index], where, ranks["body"][where.index])

    if epilogue is not None:
        sources["epilogue"] = build.absorb(epilogue, [fetch(a) for a in layout.epilogue_arguments], "late")
    graph.outputs.extend(fetch(where) for where in layout.results)
    return ir.Model(graph, ir_version=10)
