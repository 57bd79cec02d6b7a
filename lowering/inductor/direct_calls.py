"""Lets Inductor's code call operators of ours on a CPU without the dispatcher.

PyTorch's dispatcher costs a Python operator a tenth of a millisecond where weights have just streamed past and left
its code cold in the caches: as much as a sparse MLP itself. Inductor's code has settled what the dispatcher would
(the device, no gradients, no modes), so it calls the operator's own choice of provider, `.direct`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from thresher import ops


@functools.cache
def install() -> bool:
    """Once for the process. False where this PyTorch's Inductor is built otherwise; calls are then dispatched."""
    try:
        from torch._inductor import ir, lowering
        from torch._inductor.graph import get_layout_constraint_tag, tag_to_layout_constraint

        for op in ops.all_ops():
            overload = op.overload
            if overload not in lowering.lowerings:
                tag = get_layout_constraint_tag(overload, with_default=True)
                lowering.make_fallback(overload, layout_constraint=tag_to_layout_constraint(tag), warn=False)
            lowering.lowerings[overload] = _named(lowering.lowerings[overload], op, ir)
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def _named(lower: Callable[..., Any], op: ops.Op, ir: Any) -> Callable[..., Any]:
    @functools.wraps(lower)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor.virtualized import V

        result = lower(*args, **kwargs)
        for leaf in torch.utils._pytree.tree_leaves(result):
            while not isinstance(leaf, ir.Buffer) and hasattr(leaf, "data"):
                leaf = leaf.data
            kernel = leaf.inputs[0] if isinstance(leaf, ir.MultiOutput) else None
            if isinstance(kernel, ir.FallbackKernel) and not V.graph.cpp_wrapper and _on_cpu(kernel):
                kernel.python_kernel_name = f"torch.ops.{ops.NAMESPACE}.{op.name}.default.direct"
        return result

    return lowered


def _on_cpu(kernel: Any) -> bool:
    device = kernel.get_device()
    return device is not None and device.type == "cpu"
