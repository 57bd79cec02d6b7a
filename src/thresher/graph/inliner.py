"""Runs a graph from Dynamo or an export once more, to be traced: what is not for a Program to hold is settled on the way."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from ..errors import CaptureError
from . import sharded
from .sizes import as_many_values, is_number

_DROPOUTS = (torch.nn.functional.dropout, torch.dropout, torch.ops.aten.dropout.default)


class Inliner(fx.Interpreter):
    """Runs a captured graph; sees through grad-mode wrappers and fixes wrapped Python floats.

    With `dynamic=True` Dynamo passes floats such as a norm's epsilon as 0-d tensors and reads them
    with `.item()`. Turning the symbolic float into a number adds Dynamo's own guard on its value.
    """

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return self.number(n, result) if isinstance(result, torch.SymFloat) else result

    def number(self, n: fx.Node, result: torch.SymFloat) -> float:
        return float(result)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "__name__", "")
        if target is torch.amp.autocast_mode._enter_autocast:
            region = torch.autocast(*args)
            region.__enter__()  # so that what follows is traced under it; the entry is traced as well
            return region
        if target is torch.amp.autocast_mode._exit_autocast:
            return args[0].__exit__(None, None, None)
        if name == "wrap_with_set_grad_enabled":
            _, body, *rest = args
            return type(self)(body).run(*rest)
        if name == "wrap_with_autocast":
            device, dtype, enabled, _, body, *rest = args
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                return type(self)(body).run(*rest)
        if sharded.takes(args, kwargs):
            return sharded.call(target, args, kwargs)
        if target in _DROPOUTS and not _trains(*args, **kwargs):
            return (
                args[0] if args else kwargs["input"]
            )  # the tensor itself, which torch's functional tracing would freeze
        if name == "scaled_dot_product_attention":
            as_many_values(*args, **kwargs)
        if target is operator.getitem and isinstance(args[0], torch.Tensor):
            args = (args[0], tree_map_only(slice, _last_places, args[1]))
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if sharded.takes(args, kwargs) and target not in sharded.METHODS:
            return sharded.call(target, args, kwargs)
        return super().call_method(target, args, kwargs)


def _trains(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool | None = None
) -> bool:
    """Whether a dropout with these arguments drops anything; torch.dropout says `train`."""
    return training if train is None else train


def _last_places(given: slice) -> slice:
    """A slice of the last k places, k a number that the caller passes, with k as it is in this call and guarded. Else only
    data would say how many places are left, and nothing behind could be compiled for a size: `logits_to_keep` of a decoder
    is one such number, and a program of its own for each is what its few values are worth."""
    start = given.start
    number = isinstance(start, torch.SymInt) and given.stop is None and is_number(-start)
    return slice(int(start), None, given.step) if number else given


class Unguarded(Inliner):
    """Of an exported graph, which nothing guards at a call: a number computed from a size that may change is refused."""

    def number(self, n: fx.Node, result: torch.SymFloat) -> float:
        if result.node.expr.free_symbols:
            said = f"{n.name} is a number that is computed from a size of the inputs, {result.node.expr}, and an exported "
            kept = "program would keep the example's. Export with fixed sizes, or compute it as a tensor."
            raise CaptureError(said + kept)
        return float(result)
