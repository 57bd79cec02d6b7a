"""Before anything is built: which nodes of a program a target runs natively, which fall back, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from thresher import ops, plain_form
from thresher.graph.dialect import _SIZE_FUNCTIONS as SIZES
from thresher.graph.nodes import module_fqn
from thresher.graph.packed_layout import PackedLayout
from thresher.graph.program import Program

from .catalog import runtime as runtime_of
from .decompose import number_read, numbers_read, op_name
from .providers import example_arguments
from .target import DECOMPOSED, FALLBACK, NATIVE, REFUSED, Runtime


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

    target: a name in `lowering.catalog.TARGETS`. Raises ArgumentError for another.
    """
    runtime = runtime_of(target)
    found = Coverage(target)
    layout: PackedLayout | None = program.packing
    parts = (
        [program] + [p for p in (layout.prologue, layout.epilogue) if p is not None] if layout else [program]
    )
    for part in parts:
        if not runtime.sizes:
            found.entries += [Entry(n.name, "input", "", REFUSED, number_read(n)) for n in numbers_read(part)]
        for node in part.nodes():
            entry = _look(node, runtime)
            if entry is None:
                found.others += 1
            else:
                found.entries.append(entry)
    if layout is not None and runtime.outside:
        found.entries.append(Entry("packing", "pack and unpack", "", FALLBACK, runtime.outside))
    return found


def _look(node: fx.Node, runtime: Runtime) -> Entry | None:
    """The account of one node, or None for an ordinary one."""
    target, how, reason = node.target, NATIVE, ""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == ops.NAMESPACE:
        how, reason = _own(node, runtime)
    elif not runtime.operators:
        why = _refused(node, runtime)
        if why is None:
            return None
        how, reason = REFUSED, why
    else:
        return None
    return Entry(node.name, str(target), module_fqn(node), how, reason)


def _refused(node: fx.Node, runtime: Runtime) -> str | None:
    """Why a target that knows ATen alone cannot take a node that is none of ours, or None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None if node.target in SIZES else "It is a Python function and no operator."
    if node.target.namespace == "aten":
        return runtime.refuses(node)
    return f"Operators of {node.target.namespace} are the caller's own; only PyTorch can run them."


def _own(node: fx.Node, runtime: Runtime) -> tuple[str, str]:
    """What a target makes of an operator of ours: its own form, else its provider, else the plain form."""
    form = runtime.forms.get(op_name(node))
    account = form.account(node, runtime) if form is not None else None
    if account is not None:
        return account
    if runtime.operators:
        return _provider(node)
    op = ops.of(node.target)
    plain = op.plain if op is not None else plain_form.NONE
    if isinstance(plain, str):
        return REFUSED, plain
    if plain.loss:
        return FALLBACK, plain.loss
    return DECOMPOSED, plain.says or "Plain operators of the same meaning."


def _provider(node: fx.Node) -> tuple[str, str]:
    """Which provider a call at the captured sizes runs with, so far as metadata tells."""
    op = ops.of(node.target)
    if op is None:
        return NATIVE, ""
    try:
        with FakeTensorMode() as mode:
            provider, passed = op.choose(*example_arguments(node, mode))
    except Exception as reason:  # a sample call cannot be made; the real one will choose
        return NATIVE, f"The provider is chosen at each call ({type(reason).__name__})."
    if provider.name != "reference":
        return NATIVE, ""
    why = " ".join(f"Not {n}: {text}" for n, text in passed)
    return FALLBACK, f"It runs its reference in plain PyTorch. {why}".strip()
