"""Which sizes of its inputs a graph of Dynamo's was made for, asked without Dynamo."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

_FUNCTIONS = {"FloorDiv": lambda a, b: a // b, "CleanDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b,
              "PythonMod": lambda a, b: a % b, "Max": max, "Min": min}  # fmt: skip


class SizeGuards:
    """known: the fake tensors and sizes that the graph was made with. Ask once the graph is compiled whole: what its
    making assumes of sizes is known then, and read at the first question."""

    def __init__(self, known: Sequence[Any]):
        self._known: Sequence[Any] = known
        self._sources: list[tuple[int, int]] = []
        self._numbers: dict[int, tuple[int, int] | None] = {}
        self._fixed: list[tuple[torch.dtype, tuple[int | None, ...]] | None] = []
        self._dims: list[tuple[int, int]] = []
        self._check: Callable[..., tuple[list[Any], bool]] | None = None
        self._read = False

    def numbers(self) -> dict[int, tuple[int, int] | None]:
        """Inputs that are sizes, by index: which tensor's, and in which dimension; None where the graph takes one number
        only, though Dynamo passes it."""
        self._find()
        return self._numbers

    def hold(self, inputs: Sequence[Any]) -> bool:
        """Whether the graph may be given these inputs, tensors and sizes in order; also False where that cannot be told."""
        self._find()
        if self._check is None:
            return False
        for given, fixed in zip(inputs, self._fixed):
            if fixed is None:
                continue
            shape = given.shape
            if given.dtype != fixed[0] or len(shape) != len(fixed[1]):
                return False
            for size, wanted in zip(shape, fixed[1]):
                if wanted is not None and size != wanted:
                    return False
        values = [inputs[i].shape[d] for i, d in self._sources]
        sizes, right = self._check(*values)
        return bool(right) and sizes == [inputs[i].shape[d] for i, d in self._dims]

    def _find(self) -> None:
        if self._read:
            return
        self._read = True
        try:
            self._check = self._checked()
        except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError):
            self._check = None  # a size that no input says, or arithmetic of a kind that is not known here
        self._known = ()

    def _checked(self) -> Callable[..., tuple[list[Any], bool]]:
        import sympy

        env: Any = None
        symbols: dict[Any, tuple[int, int]] = {}
        dims: list[Any] = []
        numbers: dict[int, Any] = {}
        for index, known in enumerate(self._known):
            if isinstance(known, torch.SymInt):
                env, numbers[index] = known.node.shape_env, known.node.expr
                self._fixed.append(None)
                continue
            if not isinstance(known, torch.Tensor):
                raise TypeError("It is no tensor and no size.")
            self._fixed.append((known.dtype, tuple(s if isinstance(s, int) else None for s in known.shape)))
            for dim, size in enumerate(known.shape):
                if not isinstance(size, torch.SymInt):
                    continue
                env = size.node.shape_env
                expression = env.replace(size.node.expr)
                if expression.is_Symbol and expression not in symbols:
                    symbols[expression] = index, dim
                dims.append(expression)
                self._dims.append((index, dim))
        for index, expression in numbers.items():
            expression = env.replace(expression)
            self._numbers[index] = None if expression.is_Integer else symbols[expression]
        right: list[Any] = []
        for guard in env.guards if env is not None else ():
            expression = env.replace(guard.expr)
            if not expression.free_symbols <= symbols.keys():
                raise KeyError(expression)
            if expression is not sympy.true:
                right.append(expression)
        for symbol in symbols:
            bounds = env.var_to_range.get(symbol)
            if bounds is None:
                continue
            for limit, holds in ((bounds.lower, sympy.Ge), (bounds.upper, sympy.Le)):
                if limit.is_Integer and abs(int(limit)) < 1 << 62:
                    right.append(holds(symbol, limit))
        self._sources = list(symbols.values())
        made: Any = sympy.lambdify(list(symbols), [dims, sympy.And(*right)], [_FUNCTIONS, math])
        return made  # type: ignore[no-any-return]
