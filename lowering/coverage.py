"""Before anything is built: which nodes of a program a target runs natively, which fall back, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher import ops, plain_form
from thresher.errors import unknown_key
from thresher.graph.dialect import _SIZE_FUNCTIONS as SIZES
from thresher.graph.nodes import module_fqn, value
from thresher.graph.packed_layout import PackedLayout
from thresher.graph.program import Program

from .decompose import op_name
from .onnx.attention import UNRUN, by_multi_head, no_packed
from .onnx.integers import no_nbits

TARGETS = ("reference", "inductor", "aoti", "onnx-portable", "onnx-ort", "onnx-ort-cuda", "tensorrt")
NATIVE, DECOMPOSED, FALLBACK, REFUSED = "native", "decomposed", "fallback", "refused"
_AS_IS = {"reference", "inductor", "aoti"}


@dataclass(frozen=True)
class Entry:
    """One node. how: native (one operator of the target's), decomposed (several, same meaning), fallback (runs,
    and slower or larger than meant) or refused. reason: why it is not native; empty for native ones."""

    node: str
    operator: str
    module: str
    how: str
    reason: str = ""


@dataclass
class Coverage:
    """What a target makes of a program. entries: operators of ours and what the target refuses, in order.

    others: how many nodes of plain ATen there are beside them, which every target takes.
    """

    target: str
    entries: list[Entry] = field(default_factory=list)
    others: int = 0

    @property
    def native(self) -> float:
        """Share of the nodes that run natively."""
        total = len(self.entries) + self.others
        return (self.others + sum(e.how == NATIVE for e in self.entries)) / total if total else 1.0

    @property
    def refused(self) -> list[Entry]:
        return [e for e in self.entries if e.how == REFUSED]

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.native:.1%} of {len(self.entries) + self.others} nodes run natively."]
        found = Counter((e.operator, e.how, e.reason) for e in self.entries)
        for (operator, how, reason), count in found.items():
            lines.append(f"  {count} x {operator}: {how}{'. ' + reason if reason else ''}")
        return "\n".join(lines)


def coverage(program: Program, target: str) -> Coverage:
    """What a target would make of a program, without building. The parts around a packed body count too.

    target: one of TARGETS. Raises ArgumentError for another.
    """
    if target not in TARGETS:
        raise unknown_key("target", target, TARGETS)
    found = Coverage(target)
    layout: PackedLayout | None = program.packing
    parts = (
        [program] + [p for p in (layout.prologue, layout.epilogue) if p is not None] if layout else [program]
    )
    for part in parts:
        for node in part.nodes():
            entry = _look(part, node, target)
            if entry is None:
                found.others += 1
            else:
                found.entries.append(entry)
    if layout is not None and target == "tensorrt":
        found.entries.append(Entry("packing", "pack and unpack", "", FALLBACK,
                                   "TensorRT has no NonZero: the caller packs and unpacks around the engine."))  # fmt: skip
    return found


def _look(program: Program, node: fx.Node, target: str) -> Entry | None:
    """The account of one node, or None for an ordinary one."""
    operator = str(node.target)
    if not isinstance(node.target, torch._ops.OpOverload):
        if node.target in SIZES or target in _AS_IS:
            return None
        return Entry(
            node.name, operator, module_fqn(node), REFUSED, "It is a Python function and no operator."
        )
    if node.target.namespace == "aten":
        return _aten(node, operator, target)
    if node.target.namespace != "thresher":
        reason = f"Operators of {node.target.namespace} are the caller's own; only PyTorch can run them."
        return None if target in _AS_IS else Entry(node.name, operator, module_fqn(node), REFUSED, reason)
    how, reason = _own(program, node, target)
    return Entry(node.name, operator, module_fqn(node), how, reason)


def _aten(node: fx.Node, operator: str, target: str) -> Entry | None:
    known = value(node)
    complex_result = isinstance(known, torch.Tensor) and known.dtype.is_complex
    if target in _AS_IS or not complex_result:
        return None
    return Entry(node.name, operator, module_fqn(node), REFUSED, "ONNX operators take no complex numbers.")


def _own(program: Program, node: fx.Node, target: str) -> tuple[str, str]:
    name = op_name(node)
    if target in _AS_IS:
        return _provider(node, name)
    if name in ("varlen_attention", "varlen_attention_masked"):
        return DECOMPOSED, _attention(node, name, target)
    if name == "wna16_linear":
        bits, group = node.args[5:7]
        inputs = int(value(node.args[0]).shape[-1])
        reason = no_nbits(target.removeprefix("onnx-"), inputs, bits, group, 4)  # type: ignore[arg-type]
        if target.startswith("onnx-ort"):
            return (NATIVE, "") if reason is None else (DECOMPOSED, f"DequantizeLinear and MatMul. {reason}")
        return DECOMPOSED, "A blocked DequantizeLinear and MatMul, which engines fuse into one product."
    if name == "nvfp4_linear":
        return _nvfp4(node, target)
    op = ops.of(node.target)
    plain = op.plain if op is not None else plain_form.NONE
    if isinstance(plain, str):
        return REFUSED, plain
    if plain.loss:
        return FALLBACK, plain.loss
    return DECOMPOSED, plain.says or "Plain operators of the same meaning."


def _attention(node: fx.Node, name: str, target: str) -> str:
    """What packed attention becomes in a file."""
    runtime = target.removeprefix("onnx-")
    kept = no_packed(node, runtime) if name == "varlen_attention" else "The mask is the batch's own."
    if kept is None and by_multi_head(node, runtime):
        return f"PackedMultiHeadAttention over packed tokens. {UNRUN}"
    if kept is None:
        return "GroupQueryAttention, each packed sequence a row as long as the longest: no mask of all packed tokens."
    mask = "an added mask, which TensorRT fuses" if target == "tensorrt" else "a mask of all packed tokens"
    why = f"Attention under {mask}: memory grows with the square of the packed tokens."
    return f"{why} {kept}" if runtime.startswith("ort") else why


def _nvfp4(node: fx.Node, target: str) -> tuple[str, str]:
    named = (*node.args[6:], node.kwargs.get("activations", "exact"))
    activations = next(a for a in named if isinstance(a, str))
    given = node.args[4] if len(node.args) > 4 else node.kwargs.get("input_scale")
    if target == "onnx-portable":
        return DECOMPOSED, "Two DequantizeLinear over FLOAT4E2M1 codes, as the standard's two-level scaling."
    if target.startswith("onnx"):
        return (
            FALLBACK,
            "ONNX Runtime reads no FLOAT4E2M1: codes are stored as int8, exact, 8.5 bits and not 4.5.",
        )
    if activations != "nvfp4":
        return (
            REFUSED,
            "TensorRT expands weight-only FP4 to half before the product, so the audit would refuse it.",
        )
    if given is None:
        return REFUSED, "TensorRT quantizes activations with a fixed tensor scale, and none was calibrated."
    return NATIVE, ""


def _provider(node: fx.Node, name: str) -> tuple[str, str]:
    """Which provider a call at the captured sizes runs with, so far as metadata tells."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .providers import _example

    try:
        with FakeTensorMode() as mode:
            provider, passed = ops.get(name).choose(*(_example(a, mode) for a in node.args))
    except Exception as reason:  # a sample call cannot be made; the real one will choose
        return NATIVE, f"The provider is chosen at each call ({type(reason).__name__})."
    if provider.name != "reference":
        return NATIVE, ""
    why = " ".join(f"Not {n}: {text}" for n, text in passed)
    return FALLBACK, f"It runs its reference in plain PyTorch. {why}".strip()


def describe(entries: list[Entry]) -> dict[str, Any]:
    """Counts by kind, for records."""
    return dict(Counter(e.how for e in entries))
