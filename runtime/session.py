"""A Session: what the caller calls. It packs and unpacks, keeps packed weights fresh, and counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from thresher.errors import ArgumentError
from thresher.layout import Gather, PackedLayout, Passed, PlanField, Scatter
from thresher.lowering.target import Lowered, Target
from thresher.program import Program
from thresher.report import Report

from .freshness import Freshness
from .packing import PackPlan, pack, plan, unpack


@dataclass
class Counters:
    """calls: all of them. packed: run on real tokens only. padded: run as the model was written, with a
    count for each reason. repacked: weights recomputed because the model's changed. tokens, positions:
    real tokens, and positions of the padded batches they came in."""

    calls: int = 0
    packed: int = 0
    padded: Counter[str] = field(default_factory=Counter)
    repacked: int = 0
    lowered: int = 0
    tokens: int = 0
    positions: int = 0

    @property
    def padding(self) -> float:
        """Share of all positions so far that were padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


class Session:
    """Runs one Program for its caller. Safe to call from several threads.

    program: rewritten. target: lowers it. plain: the target for the few nodes around a packed body, which
    are not worth a compilation. freshness: see `Recipe.freshness`. certificate: set by whoever compiled it;
    `to_dict()` gives plain data.
    """

    def __init__(
        self, program: Program, target: Target, plain: Target, report: Report, freshness: str = "check"
    ):
        self.program, self.target, self.plain, self.report = program, target, plain, report
        self.certificate: Any = None
        self.counters = Counters()
        self._lock = threading.RLock()
        self._fresh = Freshness(program, freshness)
        self._body = self._lower(program)
        layout = program.packing
        self._prologue = plain.lower(layout.prologue) if layout and layout.prologue else None
        self._epilogue = self._lower_epilogue(layout)
        self._padded: tuple[Lowered, Freshness] | None = None
        self._mode = freshness

    def __call__(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> list[Any]:
        """Run on the caller's inputs, in the order of the captured program's placeholders.

        weights: the live tensors by FQN.
        """
        with self._lock:
            self.counters.calls += 1
        layout: PackedLayout | None = self.program.packing
        if layout is None:
            return self._body.run(inputs, self._live(self._body, self._fresh, weights))
        packing = plan(inputs[layout.mask])
        self._check_mask(inputs, layout)
        reason = self._why_padded(packing, layout)
        if reason is None:
            early = self._run_prologue(inputs, layout, weights)
            reason = self._leak(early, packing, layout)
        if reason is not None:
            return self._run_padded(inputs, weights, reason)
        with self._lock:
            self.counters.packed += 1
            self.counters.tokens += packing.tokens
            self.counters.positions += packing.batch * packing.width
        return self._run_packed(inputs, early, packing, layout, weights)

    def _run_packed(
        self,
        inputs: Sequence[Any],
        early: list[Any],
        packing: PackPlan,
        layout: PackedLayout,
        weights: Mapping[str, Any],
    ) -> list[Any]:
        sources: dict[str, Sequence[Any]] = {"input": inputs, "prologue": early}
        arguments = [_argument(a, sources, packing) for a in layout.arguments]
        sources["body"] = self._body.run(arguments, self._live(self._body, self._fresh, weights))
        padded: dict[Scatter, Any] = {}

        def fetch(where: Scatter | Passed) -> Any:
            if isinstance(where, Passed):
                return sources[where.origin][where.index]
            if where not in padded:
                padded[where] = _unpack(sources["body"][where.index], where, packing)
            return padded[where]

        if self._epilogue is not None:
            lowered, fresh = self._epilogue
            late = [fetch(a) for a in layout.epilogue_arguments]
            sources["epilogue"] = lowered.run(late, self._live(lowered, fresh, weights))
        return [fetch(r) for r in layout.results]

    def _run_prologue(
        self, inputs: Sequence[Any], layout: PackedLayout, weights: Mapping[str, Any]
    ) -> list[Any]:
        if self._prologue is None or layout.prologue is None:
            return []
        by_name = [layout.prologue.weights[n] for n in self._prologue.weights]
        return self._prologue.run(inputs, [weights.get(w.fqn, w.tensor) for w in by_name])

    def _check_mask(self, inputs: Sequence[Any], layout: PackedLayout) -> None:
        mask, tokens = inputs[layout.mask], inputs[layout.tokens]
        if mask.shape != tokens.shape[:2]:
            raise ArgumentError(
                "attention_mask",
                f"shape {tuple(mask.shape)}",
                f"{tuple(tokens.shape[:2])}, the shape of the tokens",
                "Pass the mask the tokenizer returned with these tokens.",
            )

    def _why_padded(self, packing: PackPlan, layout: PackedLayout) -> str | None:
        """Why this call cannot be packed, as a sentence, or None."""
        if packing.tokens < 2:
            return "The batch has fewer than two real tokens."
        if layout.windowed() and _has_holes(packing):
            return "A row has holes in its mask, and a sliding window counts distances across them."
        if packing.width > layout.proven and layout.reclassify is not None:
            with self._lock:
                if packing.width > layout.proven:
                    if {**layout.visibilities, **layout.reclassify(packing.width)} != layout.visibilities:
                        return "At this length the model's attention mask shows a window that shorter ones did not."
                    layout.proven = packing.width
        return None

    def _leak(self, early: list[Any], packing: PackPlan, layout: PackedLayout) -> str | None:
        for index in layout.masks:
            mask = early[index]
            seen = mask if mask.dtype == torch.bool else mask > -1e4
            seen = seen.expand(packing.batch, seen.shape[1], packing.width, packing.width)
            real = torch.zeros(packing.batch, packing.width, dtype=torch.bool, device=mask.device)
            real.view(-1)[packing.idx[: packing.tokens]] = True
            if (seen & real[:, None, :, None] & ~real[:, None, None, :]).any():
                return "The attention mask lets a real token see a pad token."
        return None

    def _run_padded(
        self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor], reason: str
    ) -> list[Any]:
        with self._lock:
            self.counters.padded[reason] += 1
            if self._padded is None:
                padded = self.program.packing.padded
                self._padded = (self._lower(padded), Freshness(padded, self._mode))
        lowered, fresh = self._padded
        return lowered.run(inputs, self._live(lowered, fresh, weights))

    def _lower_epilogue(self, layout: PackedLayout | None) -> tuple[Lowered, Freshness] | None:
        if layout is None or layout.epilogue is None:
            return None
        small = len(layout.epilogue.nodes()) <= 32
        lowered = self.plain.lower(layout.epilogue) if small else self._lower(layout.epilogue)
        return lowered, Freshness(layout.epilogue, self._fresh.mode)

    def _lower(self, program: Program) -> Lowered:
        self.counters.lowered += 1
        return self.target.lower(program)

    def _live(
        self, lowered: Lowered, fresh: Freshness, weights: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        tensors, repacked = fresh.tensors(lowered.weights, weights)
        if repacked:
            with self._lock:
                self.counters.repacked += repacked
        return tensors


def _argument(
    where: Gather | PlanField | Passed, sources: Mapping[str, Sequence[Any]], packing: PackPlan
) -> Any:
    if isinstance(where, PlanField):
        return {"cu_seqlens": packing.cu_seqlens, "max_len": packing.max_len, "rows": packing.rows,
                "columns": packing.cols}[where.name]  # fmt: skip
    tensor = sources[where.origin][where.index]
    if isinstance(where, Passed):
        return tensor
    if where.batch == where.sequence:
        return tensor.index_select(where.sequence, packing.idx)
    if where.batch is None:
        return tensor.index_select(where.sequence, packing.cols)
    if tensor.shape[where.sequence] == 1:
        shape = list(tensor.shape)
        shape[where.sequence] = packing.width
        tensor = tensor.expand(shape)
    return pack(tensor, packing, (where.batch, where.sequence))


def _unpack(tensor: torch.Tensor, where: Scatter, packing: PackPlan) -> torch.Tensor:
    if where.batch == where.sequence:
        shape = list(tensor.shape)
        shape[where.sequence] = packing.batch * packing.width
        return tensor.new_zeros(shape).index_copy(where.sequence, packing.idx, tensor)
    return unpack(tensor, packing, (where.batch, where.sequence))


def _has_holes(packing: PackPlan) -> bool:
    rows, columns = packing.rows[: packing.tokens], packing.cols[: packing.tokens]
    return bool(((columns.diff() != 1) & (rows.diff() == 0)).any())
