"""Graphs that Thresher leaves as they are: which ones, what is said of them, and what runs them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .graph import sharded
from .graph.nodes import module_fqn
from .notices import warn


def as_fault(fault: Exception) -> str:
    """What to say of an error that no part of Thresher foresaw: what it was, and where."""
    lines = (str(fault).strip() or "no message").splitlines()[0]
    here = [f for f in traceback.extract_tb(fault.__traceback__) if "torch" not in Path(f.filename).parts]
    at = f" (in {here[-1].name}, {Path(here[-1].filename).name} line {here[-1].lineno})" if here else ""
    return f"Thresher failed on this graph by a fault of its own, please report it. {type(fault).__name__}: {lines}{at}"


def leave_alone(
    gm: fx.GraphModule, example_inputs: Sequence[Any], target: str, reason: str
) -> Callable[..., Any]:
    """The graph as the target runs it without us, with one warning that says why."""
    if target == "reference":
        warn(f"thresher left this graph to plain PyTorch: {reason}", gm, stacklevel=3)
        return gm.forward
    warn(f"thresher left this graph to plain Inductor: {reason}", gm, stacklevel=3)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs))  # type: ignore[return-value]


def cannot_rewrite(gm: fx.GraphModule) -> str | None:
    """Why a graph is not ours to rewrite: training, or tensors that are not plain ones."""
    for node in gm.graph.nodes:
        known = node.meta.get("example_value")
        if node.op == "placeholder" and sharded.gathered(node):
            return (
                f"{node.name} belongs to FSDP, which gathers the weights for each call and frees them again, so that a pass "
                "cannot convert them once and keep the result. Shard with tensor parallelism instead."
            )
        wrapped = is_traceable_wrapper_subclass(known) and not sharded.is_sharded(known)
        if node.op == "placeholder" and wrapped:
            return (
                f"{node.name} is a {type(known).__name__}, a tensor subclass that wraps other tensors, and passes read "
                "plain tensors only. "
                "Inductor compiles such a graph as it is."
            )
        if (
            node.op == "placeholder"
            and isinstance(known, torch.Tensor)
            and known.requires_grad
            and torch.is_grad_enabled()
        ):
            return "Gradients are being recorded. Call the model under torch.no_grad() or torch.inference_mode()."
        if node.target is torch.nn.functional.dropout:
            p, training = (list(node.args[1:3]) + [node.kwargs.get("p", 0.5), node.kwargs.get("training", True)])[:2] \
                if len(node.args) >= 3 else (node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5),
                                             node.kwargs.get("training", True))  # fmt: skip
            if training and p:
                return f"The model is in training mode (dropout is active in {module_fqn(node)}). Call model.eval() first."
    return None
