"""A Program as Python that can be read, and run."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .nodes import module_fqn, value

if TYPE_CHECKING:
    from .program import Program


def text(program: Program) -> str:
    """See `Program.text`."""
    lines = [
        "import operator",
        "from math import inf, nan",
        "",
        "import torch",
        "from torch import device",
        "",
        "",
        f"def program({', '.join(['weights', *(n.name for n in program.placeholders)])}):",
    ]
    for node in program.graph.nodes:
        if node.op == "get_attr":
            lines.append(
                f'    {node.name} = weights["{program.weights[str(node.target)].fqn}"]{_comment(node)}'
            )
        elif node.op == "call_function":
            call = ", ".join(
                [_literal(a) for a in node.args] + [f"{k}={_literal(v)}" for k, v in node.kwargs.items()]
            )
            lines.append(f"    {node.name} = {_callee(node.target)}({call}){_comment(node)}")
        elif node.op == "output":
            lines.append(
                f"    return ({', '.join(_literal(a) for a in node.args[0])}{',' * bool(node.args[0])})"
            )
    return "\n".join(lines) + "\n"


def _comment(node: fx.Node) -> str:
    known = value(node)
    if isinstance(known, torch.Tensor):
        text = f"{str(known.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in known.shape)}]"
    elif known is None:
        text = ""
    else:
        text = str(known)
    place = module_fqn(node)
    joined = "  ".join(t for t in (text, place) if t)
    return f"  # {joined}" if joined else ""


def _callee(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    if getattr(operator, getattr(target, "__name__", ""), None) is target:
        return f"operator.{getattr(target, '__name__', '')}"
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__qualname__", None) or str(target)
    return f"{module}.{name}" if module.startswith("torch") else name


def _literal(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return argument.name
    if isinstance(argument, (list, tuple)) and not isinstance(argument, torch.Size):
        inner = ", ".join(_literal(a) for a in argument)
        return f"[{inner}]" if isinstance(argument, list) else f"({inner}{',' * (len(argument) == 1)})"
    return repr(argument)
