"""The model that a graph of Dynamo's is a part of, where Dynamo cut it.

Where the code of a model cannot be traced in one piece, such as a loop over those experts that got a token, Dynamo hands
over a graph for each piece between, and a piece begins wherever its code does: its weights are found at `up.weight`, and
nothing in it says that what it multiplies by is the model's head. Both are read off the model itself, which is on the
stack while the piece is compiled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .names import path

_WRAPPER = os.path.join("torch", "_dynamo", "eval_frame.py")
_TRACING = os.path.join("torch", "_dynamo", "convert_frame.py")
_TORCH = os.path.dirname(torch.__file__) + os.sep
PARTS_SHARE = (
    "Modules of the same code share such a graph, and its names are those of the one that was called first."
)
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclass(frozen=True)
class Part:
    """A graph that is not the whole of what was compiled.

    where: half a sentence that says where Dynamo cut. vocabulary: rows of the model's largest table of embeddings, as many
    as its head has results; 0 without one. prefix: the module that the graph's names begin at; empty where that is the
    model, or not known.
    """

    where: str
    vocabulary: int = 0
    prefix: str = ""


def part_of(
    gm: fx.GraphModule, tensors: Sequence[torch.Tensor], relative: Sequence[str]
) -> tuple[Part | None, list[str]]:
    """What a graph is a part of while Dynamo compiles it, None for a whole model, and the names of its weights in the model.

    relative: what the weights are called where the graph begins. They keep those names where one is not the model's. Of a
    tensor with several names in the model it is one that ends as its name in the graph does, and of those one of no table of
    embeddings, which a graph without a look-up multiplies by under its other name.
    """
    model, inside = _on_the_stack()
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = bool(getattr(reason, "graph_break", False))
    if not inside and not broken:
        return None, list(relative)
    names = _names(model, tensors, relative)
    prefixes = {n.removesuffix(f".{r}") if n != r else "" for n, r in zip(names, relative)}
    one = prefixes.pop() if len(prefixes) == 1 else ""
    prefix = one if all(n == f"{one}.{r}" for n, r in zip(names, relative)) else ""
    modules = model.modules() if model is not None else ()
    rows = max((m.num_embeddings for m in modules if isinstance(m, nn.Embedding)), default=0)
    return Part(_where(reason) if broken else "Dynamo cut the model before it", rows, prefix), names


def name_within(graph: fx.Graph, prefix: str) -> None:
    """Let the modules of a graph's nodes have the names they have in the model."""
    for node in graph.nodes:
        if prefix and (stack := node.meta.get("nn_module_stack")):
            node.meta["nn_module_stack"] = {
                k: (f"{prefix}.{path(str(p))}".rstrip("."), *rest) for k, (p, *rest) in stack.items()
            }


def _where(reason: Any) -> str:
    last = reason.user_stack[-1] if reason.user_stack else None
    at = f" at line {last.lineno} of {os.path.basename(last.filename)}" if last is not None else ""
    why = (str(reason.reason).strip().splitlines() or [""])[0].strip()
    return f"Dynamo cuts the model behind it{at}{f' ({why})' if why else ''}"


def _names(model: nn.Module | None, tensors: Sequence[torch.Tensor], relative: Sequence[str]) -> list[str]:
    known: dict[int, list[str]] = {}
    for name, tensor in _named(model):
        known.setdefault(id(tensor), []).append(name)
    if not all(id(t) in known for t in tensors):
        return list(relative)
    found = []
    for tensor, name in zip(tensors, relative):
        every = known[id(tensor)]
        alike = [n for n in every if n == name or n.endswith(f".{name}")] or every
        found.append(min(alike, key=lambda n: _is_table(model, n)))
    return found


def _is_table(model: nn.Module | None, name: str) -> bool:
    return model is not None and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _named(model: nn.Module | None) -> list[tuple[str, torch.Tensor]]:
    if model is None:
        return []
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _on_the_stack() -> tuple[nn.Module | None, bool]:
    """The model that was compiled, and whether code of it runs that is not. It is what `torch.compile` wrapped last; else
    the outermost module within the outermost compiled call."""
    frame: Any = sys._getframe(2)
    model: nn.Module | None = None
    seen: nn.Module | None = None
    wrapped: nn.Module | None = None
    inside, between, tracing = False, False, False
    while frame is not None:
        file = frame.f_code.co_filename
        own = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(own, torch._dynamo.OptimizedModule):
            wrapped = wrapped if wrapped is not None else own._orig_mod
        elif isinstance(own, nn.Module) and not isinstance(own, fx.GraphModule):
            seen = own
        if file.endswith(_WRAPPER):
            model, inside = seen, between
        elif file.endswith(_TRACING):
            tracing = True  # what is called within it is a backend, perhaps somebody's that calls ours
        elif tracing and not file.startswith((_TORCH, _OURS, "<")):
            between = True
        frame = frame.f_back
    return (wrapped if wrapped is not None else model), inside
