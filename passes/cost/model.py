"""The cost model: what a program, or one rewritten site, is expected to take on a device.

    model = CostModel(devices.get("H200"), lengths=[512, 130, 64])
    model.seconds(program)                   # the whole
    model.node(node)                         # one operator
    model.linear(rows=4, weights=4096 * 4096, dtype="float32")

A roofline: an operator takes the longer of its multiplications and its memory traffic, and what a call
costs. Where the device was measured (`thresher doctor --calibrate`) a surface of measured times
stands in for the roof. Sizes come from the fake shapes in the graph; a packed program's number of
tokens from `lengths`. FLOPs count a multiply-add as two. Code that a compiler fuses costs elements, not calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher import ops
from thresher.graph.nodes import value
from thresher.graph.packed_layout import Gather
from thresher.graph.program import Program
from thresher.graph.sizes import example_of
from thresher.machine.devices import Device
from thresher.pricing import WIDTH, Work, dtype_of, width_of

aten = torch.ops.aten
_VIEWS = {
    "view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "t",
    "alias", "detach", "split", "split_with_sizes", "chunk", "unbind", "sym_size", "_unsafe_view", "flatten",
    "unflatten", "narrow",
}  # fmt: skip
_COSTLY = {"exp", "gelu", "silu", "tanh", "sigmoid", "softmax", "_softmax", "layer_norm", "rsqrt", "pow", "erf",
           "native_layer_norm", "sin", "cos", "rms_norm"}  # fmt: skip
_LINEAR = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


@dataclass
class CostModel:
    """Prices nodes for one device.

    lengths: real tokens of each row of the batch, for packed programs; None counts every position as real.
    dense: dtypes in which a later pass would multiply by fp32 weights: where their times were measured, a linear counts
        as its fastest form.
    notes: what had to be assumed. updates: nodes whose results are written to inputs in place (`learn`).
    """

    device: Device
    lengths: Sequence[int] | None = None
    dense: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    updates: set[Any] = field(default_factory=set)
    _tokens: dict[Any, int] = field(default_factory=dict)

    def seconds(self, program: Program) -> float:
        """The expected time of one call. Of a packed program: of the body alone."""
        self.learn(program)
        return sum(self.node(n) for n in program.nodes())

    def node(self, node: fx.Node) -> float:
        """The expected seconds of one operator."""
        if node.target in _LINEAR:
            return self._linear_node(node)
        name, own = _name(node), ops.of(node.target)
        known: Rule | None = own.price if own is not None else None
        known = known or PRICES.get(name)
        if known is not None:
            return known(self, node)
        return self.work(self._any(node, name))

    def work(self, work: Work, dtype: str = "float32") -> float:
        """The roof over some work."""
        d = self.device
        roof = max(work.flops / d.matmul(dtype), work.bytes / d.bandwidth)
        return roof + work.launches * d.launch + work.elements / d.pointwise

    def linear(
        self, rows: float, weights: float, dtype: str, kernel: str = "linear", bits: float = 0.0
    ) -> float:
        """Seconds of a multiplication of `rows` rows by a weight of that many numbers.

        kernel: "linear", or an operator's class such as "wna16_linear.4". bits: stored for each weight, 0 for
        the dtype's. Without a measured surface a low-bit weight saves its bytes and multiplies as `dtype`.
        """
        measured = self.device.surfaces.get(f"{kernel}.{dtype}") or self.device.surfaces.get(kernel)
        if measured is not None:
            return measured.at(max(rows, 1.0), weights)
        width = bits / 8 if bits else WIDTH.get(dtype, 4)
        side = math.sqrt(weights)
        moved = weights * width + 2 * rows * side * WIDTH.get(dtype, 4)
        return self.work(Work(2 * rows * weights, moved, 1), dtype)

    def attention(
        self, flops: float, length: float, head_dim: float, dtype: str, moved: float, packed: bool
    ) -> float:
        """Seconds of an attention. length: keys that a query sees, mean. moved: bytes of q, k, v and result."""
        kernel = "varlen_attention" if packed else "attention"
        measured = self.device.surfaces.get(f"{kernel}.{dtype}")
        if measured is not None:  # seconds for a million FLOPs
            return measured.inside(max(length, 1.0), head_dim) * flops / 1e6 + self.device.launch
        return self.work(Work(flops, moved, 1), dtype)

    def size(self, size: Any) -> int:
        """A size as a number, a packed program's tokens included."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.free_symbols and expression.free_symbols <= set(self._tokens):
            return int(expression.subs(self._tokens))
        return example_of(size)

    def numel(self, node: Any) -> float:
        """How many elements a node's result has at the example's sizes; 0 for what is no tensor."""
        known = value(node)
        return math.prod(self.size(s) for s in known.shape) if isinstance(known, torch.Tensor) else 0

    def learn(self, program: Program) -> None:
        """Which symbols of a packed body stand for tokens, and how many there are; which inputs are written in place."""
        written = program.updates if program.packing is None else ()
        self.updates = {program.outputs[i] for i in written}
        self._tokens = {}
        layout = program.packing
        if layout is None:
            return
        body = program.placeholders[: len(layout.arguments)]
        for place, source in zip(body, layout.arguments):
            known = value(place)
            along = source.sequence if isinstance(source, Gather) else None
            if along is not None and isinstance(known, torch.Tensor):
                size = known.shape[along]
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    padded = layout.padded.placeholders[layout.tokens]
                    rows, columns = (int(s) for s in _hints(value(padded).shape[:2]))
                    if self.lengths is None:
                        self.notes.append("No example was at hand, so every position counts as a real token.")
                    self._tokens[size.node.expr] = sum(self.lengths) if self.lengths else rows * columns

    def _linear_node(self, node: fx.Node) -> float:
        x, weight = _operands(node)
        weights = self.numel(weight)
        known = value(weight)
        columns = self.size(value(node).shape[-1])
        rows = self.numel(node) / max(columns, 1)
        if not isinstance(known, torch.Tensor) or known.dim() > 2:  # a product of two activations
            flops = 2 * self.numel(node) * self.size(value(x).shape[-1])
            moved = width_of(node) * (self.numel(x) + self.numel(weight) + self.numel(node))
            return self.work(Work(flops, moved, 1), dtype_of(node))
        own = dtype_of(node)
        others = [d for d in self.dense if own == "float32" and f"linear.{d}" in self.device.surfaces]
        return min(self.linear(rows, weights, d) for d in (own, *others))

    def _any(self, node: fx.Node, name: str) -> Work:
        if name in _VIEWS or not isinstance(value(node), torch.Tensor):
            return Work()
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == ops.NAMESPACE:
            moved = sum(self.numel(a) * value(a).element_size() for a in [*node.all_input_nodes, node]
                        if isinstance(value(a), torch.Tensor))  # fmt: skip
            return Work(bytes=moved, launches=1)
        return Work(elements=self.numel(node) * (1.0 if name in _COSTLY else CHEAP_SHARE))


def _hints(sizes: Any) -> list[int]:
    return [example_of(s) for s in sizes]


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""


def _operands(node: fx.Node) -> tuple[Any, Any]:
    if node.target is aten.addmm.default:
        return node.args[1], node.args[2]
    return node.args[0], node.args[1]


CHEAP_SHARE = 0.25
"""Of what a transcendental costs an element, for adds and copies that are fused with others."""

Rule = Callable[["CostModel", fx.Node], float]
PRICES: dict[str, Rule] = {}
"""Seconds of an operator that is not defined here, by its name; one of `thresher.ops.define` brings its own."""


def price(name: str) -> Callable[[Rule], Rule]:
    """Register what an operator that is not Thresher's costs."""

    def add(function: Rule) -> Rule:
        PRICES[name] = function
        return function

    return add
