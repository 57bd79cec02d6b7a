"""Programs on a CPU without instructions for bf16 or float16: their linears go to `thresher::half_linear`.

    matched:  linear(x, weight, bias?) of a half type that the CPU does not multiply, the weight contiguous
    becomes:  half_linear(x, weight, bias)

PyTorch's products of these types take about eight times as long there as ours, whatever the number of tokens, so nothing is
measured. This comes last, after every pass, so passes only see plain linears.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.kernels import half_linear

aten = torch.ops.aten
_log = logging.getLogger(__name__)


def rewrite(graph: fx.Graph) -> int:
    """Rewrite a graph in place; how many linears were."""
    found = [node for node in graph.nodes if node.target is aten.linear.default and _fits(node)]
    for node in found:
        x, weight, bias = (*node.args, None)[:3]
        with graph.inserting_before(node):
            made = graph.call_function(half_linear.half_linear.overload, (x, weight, bias))
        made.meta = dict(node.meta)
        replace(node, made, erase=True)
    if found:
        _log.info(
            "%d linears of half types run as thresher::half_linear: this CPU multiplies none", len(found)
        )
    return len(found)


def _fits(node: fx.Node) -> bool:
    x, weight, bias = (value(a) for a in (*node.args, None)[:3])
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return False
    tensors = [x, weight] + ([bias] if isinstance(bias, torch.Tensor) else [])
    if any(t.device.type != "cpu" or t.dtype != x.dtype for t in tensors) or not half_linear.gains(x.dtype):
        return False
    return weight.is_contiguous() and (not isinstance(bias, torch.Tensor) or bias.is_contiguous())
