"""Packing in an ONNX graph: from padded inputs to a packed body and back, in standard operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.packed_layout import Counted, Gather, PackedLayout, Passed, PlanField, Scatter
from thresher.graph.program import Program

from .convert import Parts


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
        for name, given in list(graph.initializers.items()):
            if name in self.graph.initializers:
                mapping[given] = self.graph.initializers[name]
            else:
                graph.initializers.pop(name)
                self.graph.initializers[name] = given
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


def with_packing(program: Program, layout: PackedLayout, parts: Parts) -> ir.Model:
    """A packed program as one model that takes padded tensors and gives padded ones."""
    body = parts.convert(program, "body")
    # numbers counted for each call are refused before
    named = zip(program.input_names, layout.arguments, strict=True)
    by_name = {name: a for name, a in named if not isinstance(a, Counted)}
    fields: list[Gather | PlanField | Passed] = [by_name.get(n, PlanField(n)) for n in parts.fields]
    prologue = parts.convert(layout.prologue, "prologue") if layout.prologue is not None else None
    epilogue = parts.convert(layout.epilogue, "epilogue") if layout.epilogue is not None else None
    if layout.windowed():
        parts.notes.append("Sliding windows count padded columns, so rows with holes are exact too.")
    places = list(zip(layout.padded.placeholders, layout.padded.input_names, strict=True))
    inputs = [_input(place, name) for place, name in places]
    ranks = {"input": [value(p).dim() for p, _ in places], "body": _ranks(program)}
    ranks["prologue"] = _ranks(layout.prologue) if layout.prologue is not None else []
    imports: dict[str, int] = {}
    for part in (body, prologue, epilogue):
        if part is not None:
            imports.update(part.opset_imports)
    model = pack_around(inputs, layout, body, fields, prologue, epilogue, ranks, imports)
    _say_shapes(model, layout.padded, inputs)
    return model


def _say_shapes(model: ir.Model, padded: Program, inputs: Sequence[ir.Value]) -> None:
    """Give each result the sizes that the padded program's has, called as the inputs' are."""
    known: dict[Any, str] = {}  # by the size's expression
    for place, given in zip(padded.placeholders, inputs, strict=True):
        for size, name in zip(value(place).shape, given.shape or (), strict=True):
            if isinstance(size, torch.SymInt):
                known.setdefault(size.node.expr, str(getattr(name, "value", name)))
    for result, node in zip(model.graph.outputs, padded.outputs, strict=False):
        held = value(node)
        if isinstance(held, torch.Tensor):
            sizes = [s if isinstance(s, int) else known.get(s.node.expr) for s in held.shape]
            result.shape = ir.Shape(sizes)


def _ranks(program: Program) -> list[int]:
    return [value(o).dim() if isinstance(value(o), torch.Tensor) else 0 for o in program.outputs]


def _input(place: fx.Node, name: str) -> ir.Value:
    known = value(place)
    names = {0: "batch", 1: "sequence"}
    shape = [s if isinstance(s, int) else names.get(i, f"{name}_{i}") for i, s in enumerate(known.shape)]
    from torch.onnx._internal.exporter._core import torch_dtype_to_onnx_dtype

    dtype = torch_dtype_to_onnx_dtype(known.dtype)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
