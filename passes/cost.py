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

from thresher import site_counts
from thresher.devices import Device
from thresher.program import Program, value
from thresher.sizes import example_of

aten = torch.ops.aten
_VIEWS = {
    "view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "t",
    "alias", "detach", "split", "split_with_sizes", "chunk", "unbind", "sym_size", "_unsafe_view", "flatten",
    "unflatten", "narrow",
}  # fmt: skip
_COSTLY = {"exp", "gelu", "silu", "tanh", "sigmoid", "softmax", "_softmax", "layer_norm", "rsqrt", "pow", "erf",
           "native_layer_norm", "sin", "cos", "rms_norm"}  # fmt: skip
_CHEAP_SHARE = (
    0.25  # of what a transcendental costs an element, for adds and copies that are fused with others
)
_LINEAR = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class Work:
    """What one operator does. flops: multiply-adds times two. bytes: weights and operands it must read and
    write. launches: calls that no compiler can fuse away. elements: of fused elementwise code."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    elements: float = 0.0


@dataclass
class CostModel:
    """Prices nodes for one device.

    lengths: real tokens of each row of the batch, for packed programs; None counts every position as real.
    notes: what had to be assumed.
    """

    device: Device
    lengths: Sequence[int] | None = None
    notes: list[str] = field(default_factory=list)
    _tokens: dict[Any, int] = field(default_factory=dict)

    def seconds(self, program: Program) -> float:
        """The expected time of one call. Of a packed program: of the body alone."""
        self.learn(program)
        return sum(self.node(n) for n in program.nodes())

    def node(self, node: fx.Node) -> float:
        """The expected seconds of one operator."""
        name = _name(node)
        if node.target in _LINEAR:
            return self._linear_node(node)
        if name in PRICES:
            return PRICES[name](self, node)
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
        width = bits / 8 if bits else _WIDTH.get(dtype, 4)
        side = math.sqrt(weights)
        moved = weights * width + 2 * rows * side * _WIDTH.get(dtype, 4)
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
        known = value(node)
        return math.prod(self.size(s) for s in known.shape) if isinstance(known, torch.Tensor) else 0

    def learn(self, program: Program) -> None:
        """Which symbols of a packed body stand for tokens, and how many there are."""
        self._tokens = {}
        layout = program.packing
        if layout is None:
            return
        body = program.placeholders[: len(layout.arguments)]
        for place, source in zip(body, layout.arguments):
            known = value(place)
            if type(source).__name__ == "Gather" and isinstance(known, torch.Tensor):
                size = known.shape[source.sequence]
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
            moved = _WIDTH.get(_dtype(node), 4) * (self.numel(x) + self.numel(weight) + self.numel(node))
            return self.work(Work(flops, moved, 1), _dtype(node))
        return self.linear(rows, weights, _dtype(node))

    def _any(self, node: fx.Node, name: str) -> Work:
        if name in _VIEWS or not isinstance(value(node), torch.Tensor):
            return Work()
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "thresher":
            moved = sum(self.numel(a) * value(a).element_size() for a in [*node.all_input_nodes, node]
                        if isinstance(value(a), torch.Tensor))  # fmt: skip
            return Work(bytes=moved, launches=1)
        return Work(elements=self.numel(node) * (1.0 if name in _COSTLY else _CHEAP_SHARE))


_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1}


def _hints(sizes: Any) -> list[int]:
    return [example_of(s) for s in sizes]


def _dtype(node: Any) -> str:
    known = value(node)
    return str(known.dtype).removeprefix("torch.") if isinstance(known, torch.Tensor) else "float32"


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""


def _operands(node: fx.Node) -> tuple[Any, Any]:
    if node.target is aten.addmm.default:
        return node.args[1], node.args[2]
    return node.args[0], node.args[1]


PRICES: dict[str, Callable[[CostModel, fx.Node], float]] = {}
"""Seconds of an operator, by its name; a third-party pass adds its own operator's here."""


def price(
    name: str,
) -> Callable[[Callable[[CostModel, fx.Node], float]], Callable[[CostModel, fx.Node], float]]:
    """Register what an operator costs. Without it an operator of ours costs its operands' bytes and a call."""

    def add(function: Callable[[CostModel, fx.Node], float]) -> Callable[[CostModel, fx.Node], float]:
        PRICES[name] = function
        return function

    return add


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An operator's argument by its name in the schema."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for index, known in enumerate(target._schema.arguments):
        if known.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, known.default_value if default is None else default)
    return default


@price("scaled_dot_product_attention")
def _sdpa(model: CostModel, node: fx.Node) -> float:
    q, k, v = node.args[:3]
    queries, keys = model.size(value(q).shape[-2]), model.size(value(k).shape[-2])
    width = model.size(value(q).shape[-1])
    heads = model.numel(q) / max(queries * width, 1)
    flops = 4 * heads * queries * keys * width
    if _argument(node, "is_causal", False):
        flops /= 2
    moved = _WIDTH.get(_dtype(node), 4) * sum(model.numel(t) for t in (q, k, v, node))
    return model.attention(flops, keys, width, _dtype(node), moved, packed=False)


def _varlen(model: CostModel, node: fx.Node, causal: bool) -> float:
    q, k, v = node.args[:3]
    heads, width = (model.size(value(q).shape[i]) for i in (1, 3))
    lengths = model.lengths or [model.size(value(q).shape[2])]
    squares = sum(l * l for l in lengths)
    flops = 4 * heads * width * squares / (2 if causal else 1)
    moved = _WIDTH.get(_dtype(node), 4) * sum(model.numel(t) for t in (q, k, v, node))
    mean = squares / max(sum(lengths), 1)
    return model.attention(flops, mean, width, _dtype(node), moved, packed=True)


@price("varlen_attention")
def _varlen_attention(model: CostModel, node: fx.Node) -> float:
    return _varlen(model, node, bool(_argument(node, "causal")))


@price("varlen_attention_masked")
def _varlen_masked(model: CostModel, node: fx.Node) -> float:
    return _varlen(model, node, False)


@price("kv_attention")
def _kv_attention(model: CostModel, node: fx.Node) -> float:
    """A few queries over a cache: the share of its slots that the mask shows, where the rows' lengths are known."""
    q, tail = node.args[0], node.args[2]
    rows, heads, queries, width = (model.size(s) for s in value(q).shape)
    slots = model.size(value(tail).shape[2])
    seen = sum(model.lengths) / max(rows, 1) if model.lengths and len(model.lengths) == rows else slots
    seen = min(seen, slots)
    flops = 4 * rows * heads * queries * seen * width
    moved = 2 * _WIDTH.get(_dtype(q), 4) * model.numel(tail) * seen / max(slots, 1)
    return model.attention(flops, seen, width, _dtype(q), moved, packed=False)


@price("nvfp4_linear")
def _nvfp4(model: CostModel, node: fx.Node) -> float:
    x = node.args[0]
    inputs = model.size(value(x).shape[-1])
    weights = inputs * model.size(value(node).shape[-1])
    mode = _argument(node, "activations", "exact")
    dtype = "nvfp4" if mode == "nvfp4" and "nvfp4" in model.device.flops else _dtype(x)
    rows = model.numel(x) / max(inputs, 1)
    return model.linear(rows, weights, dtype, f"nvfp4_linear.{mode}", bits=4.5)


@price("wna16_linear")
def _wna16(model: CostModel, node: fx.Node) -> float:
    x, scales = node.args[0], node.args[2]
    bits = _argument(node, "bits")
    inputs = model.size(value(x).shape[-1])
    weights = inputs * model.size(value(node).shape[-1])
    stored = bits + 32 * model.numel(scales) / max(weights, 1)
    return model.linear(
        model.numel(x) / max(inputs, 1), weights, _dtype(x), f"wna16_linear.{bits}", bits=stored
    )


def _density(node: fx.Node) -> float:
    """The share of neurons that were on at this site in the calls so far; all of them when nothing was counted."""
    known = site_counts.site(str(_argument(node, "site", ""))).union_density
    return 1.0 if known is None else known


@price("sparse_down")
def _sparse_down(model: CostModel, node: fx.Node) -> float:
    act, weight = node.args[:2]
    return _sparse(model, node, model.numel(act) / model.size(value(act).shape[-1]), model.numel(weight))


@price("sparse_mlp")
def _sparse_mlp(model: CostModel, node: fx.Node) -> float:
    gate = node.args[0]
    weights = model.numel(_argument(node, "up_weight")) + model.numel(_argument(node, "weight"))
    return _sparse(model, node, model.numel(gate) / model.size(value(gate).shape[-1]), weights)


def _sparse(model: CostModel, node: fx.Node, rows: float, weights: float) -> float:
    """Reads the active neurons' share of the weights; dense when there are too many tokens for that."""
    share = _density(node) if rows <= _argument(node, "bmax") else 1.0
    return model.linear(rows, weights * max(min(share + 0.02, 1.0), 1e-3), _dtype(node))
