"""What each node of a step's graph is in C++ (`kernels/csrc/step.cpp`), or why it is nothing there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.formats.hadamard import base_matrix, decompose
from thresher.graph.nodes import argument, value
from thresher.kernels import half_linear, native
from thresher.kernels.hadamard import op as hadamard
from thresher.kernels.kv import attention as kv
from thresher.kernels.nvfp4 import cpu as nvfp4
from thresher.kernels.nvfp4 import linear as nvfp4_linear
from thresher.kernels.wna16 import cpu as wna16
from thresher.kernels.wna16 import linear as wna16_linear

aten = torch.ops.aten
VIEW, UNARY, BINARY, MEAN, CAT, LINEAR, WNA16, NVFP4, ATTENTION, HADAMARD, WRITE, PUT = range(12)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3, torch.uint8: 3, torch.int8: 3,
         torch.float8_e4m3fn: 3, torch.int64: 4, torch.int32: 5}  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = {
    torch.float32: 16,
    torch.float16: 16,
    torch.bfloat16: 16 if "amx_bf16" in native.cpu_features() else 32,
}
"""Up to so many rows the product here takes less time than PyTorch's, which lays the weight out anew at every call. In bf16,
on one core of an EPYC without AMX, SmolLM2's weights by 8, 16, 32 rows took 13, 27, 59 ms here, and 42, 53, 71 there."""
MOST_DIMS = 6


HEAVY = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default,
         aten.matmul.default, aten.conv1d.default, aten.conv2d.default, aten.scaled_dot_product_attention.default,
         aten.einsum.default, aten.embedding_bag.default}  # fmt: skip
"""What must not run in Python, beside all operators of ours: where it has no form in C++, neither has the step."""


class Unfit(Exception):
    """Why a node is not run in C++, as a sentence."""


@dataclass
class Operation:
    """One operation: what it reads (nodes, numbers, tensors that are kept, or None), sizes (numbers or nodes that hold
    one) and numbers. product: it reads a weight, so nothing else may compute it for a step."""

    code: int
    reads: Sequence[Any]
    kind: int = 0
    sizes: Sequence[Any] = ()
    numbers: Sequence[float] = ()
    product: bool = False


@dataclass(frozen=True)
class Made:
    """A tensor that an operation reads and no node holds."""

    tensor: torch.Tensor = field(compare=False)


Rule = Callable[[fx.Node], Operation]
_RULES: dict[Any, Rule] = {}


def operation(node: fx.Node) -> Operation:
    """The node in C++. Raises Unfit."""
    rule = _RULES.get(node.target)
    if rule is None:
        raise Unfit(f"{node.target} has no form for a step in C++.")
    for known in (value(node), *map(value, node.all_input_nodes)):
        if isinstance(known, torch.Tensor) and (known.dim() > MOST_DIMS or known.dtype not in TYPES):
            raise Unfit(f"{node.target} has {known.dim()} dimensions of {known.dtype}.")
    return rule(node)


def writable(node: fx.Node) -> None:
    """Raise Unfit where a write to an input, `copy_`, is not one that C++ has."""
    kinds = {value(n).dtype for n in node.args[:2]}
    most = max(value(n).dim() for n in node.args[:2])
    if most > MOST_DIMS or not kinds <= TYPES.keys() or (len(kinds) > 1 and not kinds <= set(FLOATS)):
        raise Unfit(f"{node.name} writes {most} dimensions of {' and '.join(map(str, kinds))}.")


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


def _floating(*given: Any) -> None:
    for known in map(value, given):
        if isinstance(known, torch.Tensor) and known.dtype not in FLOATS:
            raise Unfit(f"It computes floating types, not {known.dtype}.")


def _view(kind: int, *names: str) -> Rule:
    def rule(node: fx.Node) -> Operation:
        sizes: list[Any] = []
        for name in names:
            given = argument(node, name)
            sizes.extend(given if isinstance(given, (list, tuple)) else [given])
        return Operation(VIEW, [node.args[0]], kind, sizes)

    return rule


for _targets, _made in {
    (aten.reshape.default,): _view(0, "shape"),
    (aten.view.default,): _view(0, "size"),
    (aten.transpose.int,): _view(1, "dim0", "dim1"),
    (aten.permute.default,): _view(2, "dims"),
    (aten.unsqueeze.default,): _view(3, "dim"),
    (aten.squeeze.dim,): _view(4, "dim"),
    (aten.select.int,): _view(5, "dim", "index"),
    (aten.expand.default,): _view(7, "size"),
}.items():
    _rule(*_targets)(_made)


@_rule(aten.slice.Tensor)
def _slice(node: fx.Node) -> Operation:
    begin, end = argument(node, "start"), argument(node, "end")
    sizes = [argument(node, "dim"), begin or 0, (1 << 62) if end is None else end, argument(node, "step")]
    return Operation(VIEW, [node.args[0]], 6, sizes)


def _unary(kind: int) -> Rule:
    def rule(node: fx.Node) -> Operation:
        _floating(node, node.args[0])
        return Operation(UNARY, [node.args[0]], kind)

    return rule


for _kind, _names in enumerate(
    ["clone alias contiguous", "neg", "rsqrt", "sqrt", "square", "reciprocal", "abs", "exp", "sigmoid", "silu", "relu",
     "tanh"]):  # fmt: skip
    for _name in _names.split():
        _rule(getattr(aten, _name).default)(_unary(_kind))


@_rule(aten.gelu.default)
def _gelu(node: fx.Node) -> Operation:
    return _unary(13 if argument(node, "approximate") == "tanh" else 12)(node)


@_rule(aten.to.dtype, aten._to_copy.default)
def _to(node: fx.Node) -> Operation:
    if any(v is not None and k not in ("dtype", "copy", "non_blocking") for k, v in node.kwargs.items()):
        raise Unfit("It is moved as well as converted.")
    return _unary(0)(node)


@_rule(aten.pow.Tensor_Scalar)
def _pow(node: fx.Node) -> Operation:
    kinds = {2: 4, 0.5: 3, -0.5: 2, -1: 5, 1: 0}
    if node.args[1] not in kinds:
        raise Unfit(f"It raises to the power of {node.args[1]}.")
    return _unary(kinds[node.args[1]])(node)  # type: ignore[index]


def _binary(kind: int) -> Rule:
    def rule(node: fx.Node) -> Operation:
        a, b = node.args[:2]
        _floating(node, a, b)
        if any(isinstance(value(x), (torch.SymInt, torch.SymFloat)) for x in (a, b)):
            raise Unfit("It computes with a size.")
        if len(node.args) > 2:
            raise Unfit("It rounds its result.")
        alpha = node.kwargs.get("alpha", 1)
        return Operation(BINARY, [a, b], kind, numbers=[float(alpha)])  # type: ignore[arg-type]

    return rule


for _kind, _name in enumerate(["add", "sub", "mul", "div"]):
    _rule(getattr(aten, _name).Tensor)(_binary(_kind))
    _rule(getattr(aten, _name).Scalar)(_binary(_kind))
_rule(aten.maximum.default)(_binary(4))
_rule(aten.minimum.default)(_binary(5))


@_rule(aten.mean.dim)
def _mean(node: fx.Node) -> Operation:
    _floating(node, node.args[0])
    dims, last = argument(node, "dim"), value(node.args[0]).dim() - 1
    if list(dims or ()) not in ([-1], [last]) or argument(node, "dtype") is not None:
        raise Unfit("It is a mean over other dimensions than the last.")
    return Operation(MEAN, [node.args[0]], int(bool(argument(node, "keepdim"))))


@_rule(aten.cat.default)
def _cat(node: fx.Node) -> Operation:
    parts = node.args[0]
    kinds = {(value(p).dtype, value(p).dim()) for p in parts}  # type: ignore[union-attr]
    if len(kinds) != 1:
        raise Unfit("It joins tensors of several types or ranks.")
    return Operation(CAT, list(parts), sizes=[argument(node, "dim")])  # type: ignore[arg-type]


def _few_rows(x: Any) -> None:
    known = value(x)
    if known.dim() != 3 or not isinstance(known.shape[1], int) or known.shape[1] != 1:
        raise Unfit("It multiplies more than one token a row.")


@_rule(aten.linear.default)
def _linear(node: fx.Node) -> Operation:
    x, weight, bias = (*node.args, None)[:3]
    _floating(node, x, weight, bias)
    if len({value(t).dtype for t in (x, weight, bias) if t is not None}) > 1 or value(weight).dim() != 2:
        raise Unfit("It multiplies different types.")
    _few_rows(x)
    kind = value(x).dtype
    sizes = [FEW_ROWS[kind], int(half_linear.gains(kind))]
    return Operation(LINEAR, [x, weight, bias], sizes=sizes, product=True)


@_rule(wna16_linear.wna16_linear.overload)
def _wna16(node: fx.Node) -> Operation:
    x, codes, scales, zeros, bias, bits = (
        argument(node, n) for n in ("x", "codes", "scales", "zeros", "bias", "bits")
    )
    _floating(x, scales, bias)
    _few_rows(x)
    kind = value(x).dtype
    strips = kind == torch.bfloat16 and bits == 4 and wna16._bf16_kernel() is not None
    plain = kind == torch.bfloat16 and (bias is None or value(bias).dtype == kind)
    few = wna16._FEW_BF16_ROWS if strips and plain else -1
    pairs = wna16.pair_rows(bits, value(x).shape[-1], value(scales).shape[1]) if plain else 0
    sizes = [bits, pairs, few, wna16._FUSED_ROWS, wna16._PLANES[kind], wna16._SLAB]
    return Operation(WNA16, [x, codes, scales, zeros, bias], sizes=sizes, product=True)


@_rule(nvfp4_linear.nvfp4_linear.overload)
def _nvfp4(node: fx.Node) -> Operation:
    names = ("x", "codes", "block_scales", "global_scale", "bias", "activations")
    x, codes, scales, alpha, bias, mode = (argument(node, n) for n in names)
    _floating(x, bias)
    _few_rows(x)
    kind = value(x).dtype
    if mode not in nvfp4.PLANES or (bias is not None and value(bias).dtype != kind):
        raise Unfit(f"It rounds activations to {mode}, or adds a bias of another type.")
    strips = kind == torch.bfloat16 and nvfp4.bf16_kernel()
    sizes = [nvfp4.PLANES[mode], nvfp4.INTEGER_ROWS[mode] if strips else -1, nvfp4.FEW_BF16_ROWS,
             nvfp4.GEMV_ROWS, nvfp4._SLAB_BYTES]  # fmt: skip
    return Operation(NVFP4, [x, codes, scales, alpha, bias], sizes=sizes, product=True)


@_rule(hadamard.hadamard.overload)
def _hadamard(node: fx.Node) -> Operation:
    x, signs, block = (argument(node, n) for n in ("x", "signs", "block"))
    _floating(x, signs)
    parts = decompose(block)
    if parts is None:
        raise Unfit(f"There is no transform of {block}.")
    return Operation(HADAMARD, [x, signs, _base(block)], sizes=[block, parts[1]])


@functools.cache
def _base(block: int) -> Made:
    return Made(base_matrix(block).contiguous())


def _attention(q: Any, k: Any, v: Any, visible: Any, scale: Any) -> Operation:
    _floating(q, k, v)
    shape = value(q).shape
    if len({value(t).dtype for t in (q, k, v)}) > 1 or not isinstance(shape[2], int) or shape[2] != 1:
        raise Unfit("It attends from several tokens a row.")
    return Operation(ATTENTION, [q, k, v, visible], numbers=[float(scale)], product=True)


@_rule(kv.kv_attention.overload)
def _kv_attention(node: fx.Node) -> Operation:
    q, pools, k, v, visible, scale = (
        argument(node, n) for n in ("q", "pools", "k_tail", "v_tail", "visible", "scale")
    )
    if pools:
        raise Unfit("It reads keys and values of few bits.")
    return _attention(q, k, v, visible, scale)


@_rule(aten.scaled_dot_product_attention.default)
def _sdpa(node: fx.Node) -> Operation:
    q, k, v, mask = (argument(node, n) for n in ("query", "key", "value", "attn_mask"))
    if mask is not None or argument(node, "is_causal") or argument(node, "dropout_p"):
        raise Unfit("It attends under a mask that says more than which slots are shown.")
    scale = argument(node, "scale")
    return _attention(q, k, v, None, float(value(q).shape[-1]) ** -0.5 if scale is None else scale)
