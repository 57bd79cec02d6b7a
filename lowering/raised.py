"""A Program run in a higher precision than it was written for: what rounding errors are measured against.

Every value of two bytes or more is computed in the wide dtype: weights and inputs are converted, casts and factories that
name a narrower floating dtype name the wide one, and what an operator still returns narrower is converted behind it.
Integers, masks, sizes and one-byte floats (codes, whose rounding is meant) stay what they are, and our operators run by
their references. Weights are converted where they are read and dropped with the values that nothing reads any more, large
ones in parts, so that no wide copy of a model ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from thresher import ops
from thresher.graph.nodes import value
from thresher.graph.program import Program

from .target import Lowered, Target, lift_weights

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
_WIDER = {torch.complex32: torch.complex64, torch.complex64: torch.complex128}
_PART = 1 << 24  # elements of a weight converted at a time: 64 MiB in fp32, 128 MiB in fp64


def narrowest(program: Program) -> torch.dtype:
    """The floating dtype of at least two bytes with the fewest digits that a program computes in; fp32 without any.

    bfloat16 counts before float16: it has three bits less.
    """
    found = set(_dtypes(program))
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return next((d for d in known if d in found), torch.float32)


def _dtypes(program: Program) -> Iterator[torch.dtype]:
    for node in program.graph.nodes:
        known = value(node)
        for one in known if isinstance(known, (tuple, list)) else (known,):
            if isinstance(one, torch.Tensor):
                yield one.dtype


def wider(dtype: torch.dtype) -> torch.dtype:
    """The precision that judges another: fp32 for the half types, else fp64."""
    return torch.float32 if dtype in HALF else torch.float64


class Raised(Target):
    """Runs programs in a wide dtype, node by node."""

    name = "raised"

    def __init__(self, wide: torch.dtype):
        self.wide = wide

    def supports(self, program: Program) -> str | None:
        return None

    def lower(self, program: Program) -> Lowered:
        module, names = lift_weights(program)
        weights = {
            n.name for n in module.graph.nodes if n.op == "placeholder" and str(n.target) in set(names)
        }

        def run(inputs: Sequence[Any], given: Sequence[torch.Tensor]) -> list[Any]:
            with torch.no_grad():
                return list(_Raise(module, self.wide, weights).run(*inputs, *given))

        return Lowered(self.name, names, run)


class _Raise(fx.Interpreter):
    """weights: names of the placeholders that are weights; their values stay narrow until a node reads them."""

    def __init__(self, module: fx.GraphModule, wide: torch.dtype, weights: set[str]):
        super().__init__(module)
        self.wide, self.weights = wide, weights

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            given = super().run_node(n)
            return given if n.name in self.weights else self.raised(given)
        if n.op != "call_function":
            return torch.utils._pytree.tree_map(self.raised, super().run_node(n))
        if n.target is aten.embedding.default:  # few rows are read
            table, *rest = (self.map_nodes_to_values(a, n) for a in n.args)
            return self.raised(n.target(table, *rest))
        if n.target is aten.linear.default and not n.kwargs:
            operands: Any = [self.map_nodes_to_values(a, n) for a in n.args]
            return self.linear(*operands)
        args, kwargs = torch.utils._pytree.tree_map(
            self.widened, self.map_nodes_to_values((n.args, n.kwargs), n)
        )
        return torch.utils._pytree.tree_map(self.raised, _function(n.target)(*args, **kwargs))

    def linear(self, x: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x, step = self.raised(x), max(1, _PART // max(1, weight.shape[-1]))
        parts = [torch.nn.functional.linear(x, self.raised(w)) for w in weight.split(step)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + self.raised(bias)

    def widened(self, given: Any) -> Any:
        """An argument as the wide program has it: dtypes by name, tensors by value."""
        return self.dtype(given) if isinstance(given, torch.dtype) else self.raised(given)

    def raised(self, given: Any) -> Any:
        if not isinstance(given, torch.Tensor):
            return given
        dtype = self.dtype(given.dtype)
        return given if dtype == given.dtype else given.to(dtype)

    def dtype(self, given: torch.dtype) -> torch.dtype:
        if given.is_complex:
            wide = torch.complex128 if self.wide == torch.float64 else torch.complex64
            return wide if given in _WIDER and wide.itemsize > given.itemsize else given
        narrow = given.is_floating_point and 1 < given.itemsize < self.wide.itemsize
        return self.wide if narrow else given


def _function(target: Any) -> Any:
    """What a node calls; of our operators the reference, which takes any precision."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == ops.NAMESPACE:
        return ops.get(target._schema.name.split("::")[1]).refer
    return target
