"""Attention as ONNX Runtime's own operators, which skip what causality and packing hide and repeat no keys.

    matched:  scaled_dot_product_attention(q, k, v, is_causal=True) over one prompt, no mask
    becomes:  com.microsoft::GroupQueryAttention over [batch, tokens, heads * head_dim]

    matched:  thresher::varlen_attention without a window
    becomes:  thresher::PackedAttention, a function in the file: each packed sequence a row of its own, with its length,
              through GroupQueryAttention; on a GPU, where no token hides another, com.microsoft's
              PackedMultiHeadAttention, which takes packed tokens as they are

Standard Attention computes the whole square of scores, of a packed body the square of all its tokens, and needs a mask
as large. Prompts with padding keep it, since their padding is in a mask.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any, cast

import torch
from torch import fx

from thresher.graph.dialect import unrepeated
from thresher.graph.nodes import argument, value
from thresher.graph.program import Program
from thresher.kernels.varlen.plain import SAYS

from ..decompose import trace_before
from ..target import DECOMPOSED, Runtime
from .weights import Weights, symbolic

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float16)
_BIDIRECTIONAL = (
    "GroupQueryAttention with causal=0, which packed encoders use, needs ONNX Runtime 1.31 or newer"
)
UNRUN = (
    "PackedMultiHeadAttention has a CUDA kernel alone: the file runs only on a GPU. Here it was compared with that "
    "operator's documented meaning in standard operators, and the kernel itself was not run."
)


def group_query(weights: Weights) -> None:
    """Replace causal attention that the operator can compute, in place.

    The CUDA operator takes half types only. It is written for GPUs, and not run by Thresher's tests.
    """
    for node in weights.program.nodes(aten.scaled_dot_product_attention.default):
        q, k, v = cast(tuple[fx.Node, ...], node.args[:3])
        given = {n: argument(node, n) for n in ("attn_mask", "dropout_p", "is_causal", "scale")}
        if not _fits(given, *(value(n) for n in (q, k, v))):
            continue
        if weights.runtime.gpu and value(q).dtype == torch.float32:
            continue
        form = functools.partial(_form, scale=given.get("scale"))  # type: ignore[arg-type]
        weights.replace(node, form, [q, unrepeated(k) or k, unrepeated(v) or v])


def whole_masks(program: Program) -> None:
    """Repeat masks of one row for all queries, in place: ONNX Runtime's Attention does not."""
    for node in program.nodes(aten.scaled_dot_product_attention.default):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        q = cast(fx.Node, node.args[0])
        if not isinstance(mask, fx.Node) or not isinstance(value(mask).shape[-2], int):
            continue
        if value(mask).shape[-2] != 1 or value(q).shape[-2] == 1:
            continue
        whole = trace_before(program, node, _repeated, [mask, q])
        node.replace_input_with(mask, whole)


def _repeated(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return mask.expand(*mask.shape[:-2], q.shape[-2], mask.shape[-1])


def account(node: fx.Node, runtime: Runtime) -> tuple[str, str]:
    """What becomes of one `varlen_attention` node in a file."""
    kept = no_packed(node, runtime)
    if kept is None and by_multi_head(node, runtime):
        return DECOMPOSED, f"PackedMultiHeadAttention over packed tokens. {UNRUN}"
    if kept is None:
        why = "GroupQueryAttention, each packed sequence a row as long as the longest: no mask of all packed tokens."
        return DECOMPOSED, why
    why = f"{SAYS} The mask is added to the scores, which the target fuses." if runtime.added_masks else SAYS
    return DECOMPOSED, f"{why} {kept}" if runtime.segments else why


def put(node: fx.Node, weights: Weights) -> None:
    """Replace one `varlen_attention` node where `no_packed` has no objection; name the function it needs."""
    if no_packed(node, weights.runtime) is not None:
        return
    q, k, v, cu_seqlens, _, scale, causal, _, softcap = cast(tuple[Any, ...], node.args[:9])
    attributes: dict[str, Any] = {"num_heads": int(value(q).shape[1]), "scale": float(scale)}
    if by_multi_head(node, weights.runtime):
        weights.note(UNRUN)
        name = "PackedEncoderAttention"
    else:
        if not causal:
            weights.note(f"{_BIDIRECTIONAL}.")
        k, v = unrepeated(k) or k, unrepeated(v) or v
        name = "PackedAttention"
        attributes |= {
            "kv_num_heads": int(value(k).shape[1]),
            "causal": int(bool(causal)),
            "softcap": float(softcap),
        }
    weights.functions.add(name)
    form = functools.partial(_packed_form, name=name, attributes=attributes)
    weights.replace(node, form, [q, k, v, cu_seqlens])


def by_multi_head(node: fx.Node, runtime: Runtime) -> bool:
    """Whether a `varlen_attention` node that can be replaced becomes PackedMultiHeadAttention."""
    return runtime.gpu and not node.args[6]


def no_packed(node: fx.Node, runtime: Runtime) -> str | None:
    """Why a `varlen_attention` node keeps a mask of all packed tokens, or None."""
    q, k, v, _, _, _, causal, window, softcap = node.args[:9]
    kinds = [value(n) for n in (q, k, v)]
    if not runtime.segments:
        return "The operators that skip what packing hides are ONNX Runtime's own."
    if argument(node, "sinks") is not None:
        return "ONNX Runtime's operators of packed attention take no sinks here."
    if window >= 0:  # type: ignore[operator]
        return "ONNX Runtime's operator counts a sliding window in packed tokens, and the model counts padded columns."
    if kinds[0].dtype not in _DTYPES:
        return (
            f"ONNX Runtime's operator takes float32 and float16 on a CPU, and the model is {kinds[0].dtype}."
        )
    if len({k.shape[3] for k in kinds}) > 1 or kinds[0].shape[3] % 8:
        return "ONNX Runtime's operator takes one head width for all, a multiple of 8."
    if not runtime.gpu and not causal and (older := _older_runtime()) is not None:
        return f"{_BIDIRECTIONAL}, and {older} is installed."
    if runtime.gpu and causal and kinds[0].dtype == torch.float32:
        return "On CUDA GroupQueryAttention takes half types only, and PackedMultiHeadAttention has no causal form."
    if runtime.gpu and not causal and softcap:
        return "PackedMultiHeadAttention has no cap on its scores."
    return None


@functools.cache
def _older_runtime() -> str | None:
    """The version of the ONNX Runtime that is installed here, when it is too old for causal=0."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if tuple(int(n) for n in version.split(".")[:2]) < (1, 31) else None
    return None


def _fits(given: dict[str, Any], q: Any, k: Any, v: Any) -> bool:
    """Whether one call is causal attention of a prompt to itself, in a type and shape the operator takes."""
    if given.get("attn_mask") is not None or given.get("dropout_p") or not given.get("is_causal"):
        return False
    if any(isinstance(t.shape[i], torch.SymInt) for t in (q, k, v) for i in (1, 3)):
        return False
    alike = str(q.shape[2]) == str(k.shape[2]) and q.shape[3] == k.shape[3] == v.shape[3]
    return alike and q.dtype in _DTYPES and q.dim() == 4 and q.shape[1] % k.shape[1] == 0


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


def _packed_form(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, name: str, attributes: dict[str, Any]
) -> torch.Tensor:
    """q: [1, Hq, T, D]; k, v: [1, Hkv, T, D]; cu: int32 [sequences + 1]; the result is [1, Hq, T, D]."""
    if "kv_num_heads" not in attributes and k.shape[1] != q.shape[1]:  # that operator shares no keys
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return symbolic(f"thresher::{name}", [q, k, v, cu], attributes, dtype=q.dtype, shape=q.shape, version=1)
