"""Autocast written into the graph: the casts a program ran with stand in it as nodes.

Under `torch.autocast` an operator's arguments are converted where it is called, which a traced graph does not show: it holds
a linear of fp32 tensors that gives bf16. Read so, such a graph is wrong for everyone who looks at dtypes. Here each cast
becomes a node, after which the program runs the same under any autocast or none; sessions run programs under none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..compat import any_autocast, has_autocast_kernel
from ..errors import CaptureError
from .nodes import value

aten = torch.ops.aten
DEVICES = ("cpu", "cuda")
_VIEWS = {
    aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.view.default, aten._unsafe_view.default,
    aten.clone.default, aten.contiguous.default,
}  # fmt: skip
_ENTER, _EXIT = "_enter_autocast", "_exit_autocast"


def ambient() -> dict[str, torch.dtype]:
    """The devices under autocast here, each with its dtype."""
    return {d: torch.get_autocast_dtype(d) for d in DEVICES if torch.is_autocast_enabled(d)}


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """A context without autocast."""
    with contextlib.ExitStack() as stack:
        if any_autocast():
            for device in ambient():
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def write_casts(graph: fx.Graph, outside: dict[str, torch.dtype]) -> int:
    """Put the casts of autocast into a graph that was traced under it, in place; returns how many there are.

    outside: what `ambient` gave around the trace. Regions within are read off the graph.
    Raises CaptureError for an operator that computes in another dtype under autocast than its arguments, converted, say.
    """
    states = [dict(outside)]
    entered: dict[fx.Node, int] = {}
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name == _ENTER:
            device, dtype, enabled = (list(node.args) + [None, True])[:3]
            inner = {d: t for d, t in states[-1].items() if d != device}
            if enabled:
                inner[str(device)] = dtype or torch.get_autocast_dtype(str(device))
            entered[node] = len(states)
            states.append(inner)
        elif node.op == "call_function" and name == _EXIT:
            del states[entered[node.args[0]] :]  # type: ignore[index]
        elif states[-1] and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _write(graph, node, states[-1], casts)
    return len(casts)


def _write(
    graph: fx.Graph,
    node: fx.Node,
    state: dict[str, torch.dtype],
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node],
) -> None:
    known = value(node)
    first = next(
        (k for k in (known if isinstance(known, (tuple, list)) else (known,)) if isinstance(k, torch.Tensor)),
        None,
    )
    if first is None or not first.is_floating_point() or first.device.type not in state:
        return
    if not has_autocast_kernel(node.target, first.device.type):
        return
    wanted = first.dtype  # of every policy: the narrow dtype, fp32, or the widest of the arguments

    def cast(argument: fx.Node) -> fx.Node:
        given = value(argument)
        plain = isinstance(given, torch.Tensor) and given.is_floating_point() and given.dtype != torch.float64
        if not plain or given.dtype == wanted or given.device != first.device:
            return argument
        if copies := _copies(argument):
            source = copies[-1].args[0]
            copies[-1].replace_input_with(source, made(source, copies[-1]))  # type: ignore[arg-type]
            for copy in copies:
                copy.meta["val"] = _converted(value(copy), wanted)
            return argument
        if (argument, wanted) not in casts:
            casts[argument, wanted] = made(argument, node)
        return casts[argument, wanted]

    def made(source: fx.Node, before: fx.Node) -> fx.Node:
        with graph.inserting_before(before):
            new = graph.call_function(aten.to.dtype, (source, wanted))
        new.meta = {k: v for k, v in before.meta.items() if k != "val"}
        new.meta["val"] = _converted(value(source), wanted)
        return new

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), cast)
    _check(node, wanted)


def _copies(argument: fx.Node) -> list[fx.Node]:
    """The nodes, last first, that only repeat and reshape the value which is to be converted: it is converted before them,
    once instead of once for each copy, and keys and values still show whose heads they share."""
    found = []
    node = argument
    while node.target in _VIEWS and len(node.users) == 1:
        found.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return found if any(n.target is aten.expand.default for n in found) else []


def _converted(known: Any, dtype: torch.dtype) -> Any:
    with known.fake_mode if hasattr(known, "fake_mode") else contextlib.nullcontext(), suspended():
        return known.to(dtype)


def _check(node: fx.Node, wanted: torch.dtype) -> None:
    """Raise unless the operator gives that dtype from its arguments without autocast."""
    args, kwargs = torch.utils._pytree.tree_map_only(fx.Node, value, (node.args, node.kwargs))
    mode: Any = value(node)
    mode = mode[0] if isinstance(mode, (tuple, list)) else mode
    with (
        mode.fake_mode if hasattr(mode, "fake_mode") else contextlib.nullcontext(),
        suspended(),
        torch.no_grad(),
    ):
        made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    made = made[0] if isinstance(made, (tuple, list)) else made
    if made.dtype != wanted:
        raise CaptureError(
            f"Autocast cannot be written into the graph: under it {node.target} ({node.name}) gives {wanted}, and without "
            f"it {made.dtype} from arguments of that type. Convert the model with .to(dtype) instead."
        )
