"""Causal self-attention as ONNX Runtime's own operator, which skips what causality hides and repeats no keys.

    matched:  scaled_dot_product_attention(q, k, v, is_causal=True) over one prompt, no mask
    becomes:  com.microsoft::GroupQueryAttention over [batch, tokens, heads * head_dim]

Standard Attention computes the whole square of scores: on a CPU a small decoder's prompt of 3,072 tokens takes 1.5
times as long with it. The operator knows one length for each row; here all
rows are as long as the tensor, and padding, if any, is in a mask, which keeps the standard form.
"""

from __future__ import annotations

from typing import Any

import torch

from thresher.program import Program, value

from .decompose import trace_before

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float16)


def group_query(program: Program, on_gpu: bool = False) -> int:
    """Replace what the operator can compute, in place; how many attentions that were.

    on_gpu: the CUDA operator takes half types only. It is written, and not run by Thresher's tests.
    """
    count = 0
    for node in program.nodes(aten.scaled_dot_product_attention.default):
        q, k, v = node.args[:3]
        given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:])) | dict(node.kwargs)
        if not _fits(given, *(value(n) for n in (q, k, v))):
            continue
        if on_gpu and value(q).dtype == torch.float32:
            continue
        k, v = _unrepeated(k), _unrepeated(v)
        scale = given.get("scale")

        def form(q: Any, k: Any, v: Any, scale: Any = scale) -> Any:
            return _form(q, k, v, scale)

        made = trace_before(program, node, form, [q, k, v])
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)
        count += 1
    return count


def _fits(given: dict[str, Any], q: Any, k: Any, v: Any) -> bool:
    """Whether one call is causal attention of a prompt to itself, in a type and shape the operator takes."""
    if given.get("attn_mask") is not None or given.get("dropout_p") or not given.get("is_causal"):
        return False
    if any(isinstance(t.shape[i], torch.SymInt) for t in (q, k, v) for i in (1, 3)):
        return False
    alike = str(q.shape[2]) == str(k.shape[2]) and q.shape[3] == k.shape[3] == v.shape[3]
    return alike and q.dtype in _DTYPES and q.dim() == 4 and q.shape[1] % k.shape[1] == 0


def _unrepeated(node: Any) -> Any:
    """Keys or values as they were before each head was repeated for the queries that share it."""
    made = node
    for target in (aten.reshape.default, aten.expand.default, aten.unsqueeze.default):
        if made.target is not target:
            return node
        if target is aten.expand.default and made.args[0].target is aten.unsqueeze.default:
            known, source = value(made), value(made.args[0].args[0])
            if known.dim() != 5 or made.args[0].args[1] not in (2, -3) or source.dim() != 4:
                return node
        made = made.args[0]
    kept = [value(n).shape[i] for n in (node, made) for i in (0, 2, 3)]
    return made if [str(s) for s in kept[:3]] == [str(s) for s in kept[3:]] else node


def _form(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """q: [B, Hq, S, D]; k, v: [B, Hkv, S, D]; the result is [B, Hq, S, D]."""
    batch, heads, tokens, width = q.shape
    kv_heads = k.shape[1]
    flat = [t.transpose(1, 2).reshape(batch, tokens, t.shape[1] * width) for t in (q, k, v)]
    last = torch.full((batch,), tokens - 1, dtype=torch.int32)  # of each row
    total = torch.full((1,), tokens, dtype=torch.int32)
    past = (batch, kv_heads, tokens, width)
    out, _, _ = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*flat, None, None, last, total],
        {"num_heads": heads, "kv_num_heads": kv_heads, "scale": width**-0.5 if scale is None else scale},
        dtypes=(q.dtype, k.dtype, v.dtype),
        shapes=((batch, tokens, heads * width), past, past),
        version=1,
    )
    return out.reshape(batch, tokens, heads, width).transpose(1, 2)
