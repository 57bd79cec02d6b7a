"""In-place code made functional by torch's own functionalization.

    y = x.new_empty(n); y[:k] = a; y[k:] = b      becomes   slice_scatter(slice_scatter(new_empty(n), a), b)
    cache.index_copy_(2, at, new); read(cache)    becomes   c = index_copy(cache, 2, at, new); read(c), and c is a result

A graph that writes is traced once more on functional tensors, which keep every view of a memory in step with it. What
reaches the caller's own tensors is kept apart: their new values become further results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    disable_functional_mode,
)

from ..errors import CaptureError
from .nodes import writes

aten = torch.ops.aten
_HARMLESS = {aten.detach_.default}  # changes what autograd records, and no value


def has_writes(graph: fx.Graph) -> bool:
    """Whether something in a traced graph writes to a tensor."""
    return any(writes(n) and n.target not in _HARMLESS for n in graph.nodes)


class Functional:
    """Runs a function on functional tensors, and says which of its arguments it wrote to.

    written: the arguments it wrote to, by number, after the call. The call gives the function's results and behind
        them the new values of these arguments, in that order.
    """

    def __init__(self, run: Callable[..., Sequence[Any]]):
        self._run = run
        self.written: list[int] = []

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        mode = FunctionalTensorMode(pre_dispatch=True, export=True)
        below = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with below, mode:
            given = [FunctionalTensor.to_functional(a) if isinstance(a, torch.Tensor) else a for a in args]
            results = list(self._run(*given))
            for result in (*given, *results):
                if isinstance(result, FunctionalTensor):
                    torch._sync(result)
            self.written = [i for i, g in enumerate(given) if _changed(g, args[i])]
            held = {_memory(given[i]) for i in self.written}
            for number, result in enumerate(results):
                if isinstance(result, FunctionalTensor) and _memory(result) in held:
                    raise CaptureError(
                        f"Result {number} lies in the memory of a tensor that the caller gave and the model writes to, "
                        "and a functional program would hand back a copy of it. Return a copy (.clone())."
                    )
            return tuple(_plain(r) for r in (*results, *(given[i] for i in self.written)))


def _changed(given: Any, argument: Any) -> bool:
    """Whether a functional tensor's values are another's than the argument's it was made from."""
    return isinstance(given, FunctionalTensor) and torch._from_functional_tensor(given.elem) is not argument


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _plain(result: Any) -> Any:
    if not isinstance(result, FunctionalTensor):
        return result
    with disable_functional_mode():
        return torch._from_functional_tensor(result.elem)
