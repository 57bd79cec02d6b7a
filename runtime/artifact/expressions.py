"""Arithmetic on named sizes, as text: written from a SymInt, read back without evaluating code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

import torch

_BINARY: dict[type[ast.AST], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
}  # fmt: skip
_CALLS: dict[str, Any] = {
    "Max": lambda *a: max(a), "Min": lambda *a: min(a), "Mod": operator.mod, "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv, "Eq": operator.eq, "Ne": operator.ne, "CleanDiv": operator.floordiv,
}  # fmt: skip


def write(size: Any) -> int | str:
    """A size as a number or as text."""
    if isinstance(size, torch.SymInt):
        text = str(size.node.expr)
        return int(text) if text.lstrip("-").isdigit() else text
    return int(size)


def readable(text: str) -> bool:
    """Whether `evaluate` understands this text."""
    try:
        names = {n.id: 7 for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name)}
        evaluate(text, names)
    except (
        ValueError,
        SyntaxError,
        ZeroDivisionError,
        RecursionError,
        TypeError,
        OverflowError,
        MemoryError,
    ):
        return False
    return True


def evaluate(text: int | str, names: Mapping[str, Any]) -> Any:
    """The value of an expression. Raises ValueError for anything but arithmetic on known names."""
    if isinstance(text, int):
        return text
    return _evaluate(ast.parse(text, mode="eval").body, names)


def _evaluate(node: ast.AST, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, names)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):  # of a condition
        return not _evaluate(node.operand, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = _evaluate(node.left, names), _evaluate(node.right, names)
        if not 0 <= power <= 8:
            raise ValueError(f"{ast.unparse(node)!r} is a power beyond 8.")
        return base**power
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _BINARY:
        left, right = _evaluate(node.left, names), _evaluate(node.comparators[0], names)
        return _BINARY[type(node.ops[0])](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        return _CALLS[node.func.id](*(_evaluate(a, names) for a in node.args))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic on {', '.join(names) or 'numbers'}.")
