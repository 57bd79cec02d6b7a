"""Inductor programs on a CPU: linears of one or two tokens go to `thresher::few_linear` where that is faster.

    matched:  linear(x, weight, bias?), then relu or not, x of at most two tokens, the weight contiguous
    becomes:  few_linear(x, weight, bias, relu)

This comes last, after every pass, so passes only see plain linears. Each shape is measured once on
the machine, against `F.linear`, and the answer is kept.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import fx

from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.kernels import few_linear

aten = torch.ops.aten
_log = logging.getLogger(__name__)
LEAST_BYTES = 1 << 21  # smaller weights may lie in a cache, and gain less than a call costs
LEAST_GAIN = 1e-4  # seconds: a Python operator costs this much more than one of PyTorch's in a busy program


def rewrite(graph: fx.Graph) -> int:
    """Rewrite a graph in place; how many linears were."""
    count = 0
    for node in list(graph.nodes):
        if node.target is not aten.linear.default or not _fits(node):
            continue
        x, weight, bias = (*node.args, None)[:3]
        user = next(iter(node.users)) if len(node.users) == 1 else None
        relu = user is not None and user.target is aten.relu.default
        output = user if relu else node
        assert output is not None
        with graph.inserting_before(node):
            made = graph.call_function(few_linear.few_linear.overload, (x, weight, bias, relu))
        made.meta = dict(output.meta)
        replace(output, made, erase=True)
        if relu:
            graph.erase_node(node)
        count += 1
    if count:
        _log.info("%d linears of few tokens run as thresher::few_linear", count)
    return count


def _fits(node: fx.Node) -> bool:
    x, weight, bias = (value(a) for a in (*node.args, None)[:3])
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return False
    tokens, size = math.prod(x.shape[:-1]), weight.numel() * weight.element_size()
    if not isinstance(tokens, int) or not isinstance(size, int) or not 0 < tokens <= few_linear.MOST_TOKENS:
        return False  # ahead of the strides: where only data decide how many tokens there are, they cannot be asked for
    tensors = [x, weight] + ([bias] if isinstance(bias, torch.Tensor) else [])
    if any(t.device.type != "cpu" or t.dtype != x.dtype or not t.is_contiguous() for t in tensors):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or size < LEAST_BYTES:
        return False
    return few_linear.saves(*weight.shape, x.dtype, tokens) > LEAST_GAIN
