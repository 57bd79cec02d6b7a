"""A Session: what the caller calls. It packs and unpacks, keeps packed weights fresh, and counts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher import at_hand
from thresher.compat import any_autocast
from thresher.errors import ArgumentError
from thresher.graph import autocast
from thresher.graph.packed_layout import PackedLayout, Passed, Scatter
from thresher.graph.program import Program
from thresher.graph.tracing import compiling
from thresher.lowering.target import Lowered, Target
from thresher.notices import warn
from thresher.phases import LOWERING, phase
from thresher.report import Report

from .counters import Counters
from .freshness import Freshness
from .packing.boundary import argument, make_plan, per_token, restore
from .packing.plan import PackPlan, survey

aten = torch.ops.aten
_PRODUCTS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.conv2d.default,
)


class Session:
    """Runs one Program for its caller. Safe to call from several threads: whatever is compiled at a call is compiled under
    Dynamo's lock, taken before the session's own.

    program: rewritten. target: lowers it. plain: the target for the few nodes around a packed body, which
    are not worth a compilation. freshness: see `Recipe.freshness`. certificate, captured: set by whoever
    compiled it; the program as it was captured, for reports.
    """

    def __init__(
        self, program: Program, target: Target, plain: Target, report: Report, freshness: str = "check"
    ):
        self.program, self.target, self.plain, self.report = program, target, plain, report
        self.certificate: Any = None
        self.later: list[Any] = []  # programs that run plainly until they are compiled
        self.captured: Program | None = None
        self.counters = Counters()
        self._lock = threading.RLock()
        self._mode = freshness
        self._fresh = Freshness(program, freshness)
        layout = program.packing
        # a packed body waits for the first batch with padding: there may be none
        self._body: Lowered | None = self._lower(program) if layout is None else None
        self._prologue = self._lower_prologue(layout)
        self._epilogue = self._lower_epilogue(layout)
        self._padded: tuple[Lowered, Freshness] | None = None
        self._pools = [] if layout is None else layout.reads_ends

    @property
    def programs(self) -> int:
        """How many programs were lowered for calls: a packed one and a padded one count apart."""
        return (self._body is not None) + (self._padded is not None)

    def __call__(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> list[Any]:
        """Run on the caller's inputs, in the order of the captured program's placeholders.

        weights: the live tensors by FQN. Inputs that the model writes to are written. Autocast changes nothing: the casts
        that a program ran with when it was captured stand in it.
        """
        if not any_autocast():
            return self.program.settle(self.results(inputs, weights), inputs)
        with autocast.suspended():
            return self.program.settle(self.results(inputs, weights), inputs)

    def results(self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> list[Any]:
        """As a call, but new values of inputs are results like any other (see `Program.updates`), and nothing is
        written unless the target itself does."""
        with self._lock:
            self.counters.calls += 1
        layout: PackedLayout | None = self.program.packing
        if layout is None:
            body = self._lowered_body()
            return body.run(inputs, self._live(body, self._fresh, weights))
        self._check_mask(inputs, layout)
        lengths, holed, strange = survey(inputs[layout.mask], layout.mask_name)
        reason = (
            f"{layout.mask_name} holds values other than 0 and 1, which do not say what is padding."
            if strange
            else self._why_padded(lengths, holed, inputs[layout.mask].shape[1], layout)
        )
        if reason is None and self._pools:
            self._warn_of_pads_read(inputs[layout.mask], layout)
        if reason is None:
            packing = make_plan(inputs[layout.mask], lengths, layout.packing)
            early = self._run_prologue(inputs, layout, weights)
            reason = self._misread(early, packing, layout)
        if reason is not None:
            return self._run_padded(inputs, weights, reason)
        with self._lock:
            self.counters.packed += 1
            self.counters.tokens += packing.tokens
            self.counters.positions += packing.batch * packing.width
        return self._run_packed(inputs, early, packing, layout, weights)

    def step(self) -> tuple[Any, list[str], Freshness] | None:
        """Where all that a call does is a step in C++: the step, the names of its weights, and what keeps them fresh."""
        if type(self) is not Session or self.program.packing is not None or self._body is None:
            return None
        return (self._body.step, self._body.weights, self._fresh) if self._body.step is not None else None

    def live(
        self, names: list[str], weights: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors that a step would be given, and those whose writes in place make one of them stale."""
        return self._fresh.tensors(names, weights)[0], self._fresh.sources(names, weights)

    def count(self) -> None:
        """Note a call that a step in C++ answered by itself."""
        with self._lock:
            self.counters.calls += 1

    def pads_unsaid(self) -> None:
        """Warn of no result that is taken from a pad."""
        self._pools = []

    def _warn_of_pads_read(self, mask: torch.Tensor, layout: PackedLayout) -> None:
        """Once: a result taken from the first or the last column is a pad's where rows are padded on that side."""
        for end in self._pools:
            if bool((mask[:, end] != 0).all()):
                continue
            self._pools = []
            here, side, other = (
                ("position 0", "left", "right") if end == 0 else ("the last position", "right", "left")
            )
            warn(
                f"thresher: the model takes a result from {here} of each row, and rows of this batch are padded on the "
                f"{side} ({layout.mask_name}[:, {end}] is 0): {here} is a pad there, whose values are zeros when packed "
                f"and arbitrary when padded. Pad on the {other} (tokenizer.padding_side = '{other}')."
            )
            return

    def _run_packed(
        self,
        inputs: Sequence[Any],
        early: list[Any],
        packing: PackPlan,
        layout: PackedLayout,
        weights: Mapping[str, Any],
    ) -> list[Any]:
        sources: dict[str, Sequence[Any]] = {"input": inputs, "prologue": early}
        arguments = [argument(a, sources, packing) for a in layout.arguments]
        body = self._lowered_body()
        sources["body"] = body.run(arguments, self._live(body, self._fresh, weights))
        padded: dict[Scatter, Any] = {}

        def fetch(where: Scatter | Passed) -> Any:
            if isinstance(where, Passed):
                return sources[where.origin][where.index]
            if where not in padded:
                padded[where] = restore(sources["body"][where.index], where, packing)
            return padded[where]

        def hand_over(where: Scatter | Passed) -> Any:
            if layout.packing.outputs == "packed" and isinstance(where, Scatter):
                result = sources["body"][where.index]
                if per_token(result):
                    return result[:, : packing.tokens]
            return fetch(where)

        if self._epilogue is not None:
            lowered, fresh = self._epilogue
            late = [fetch(a) for a in layout.epilogue_arguments]
            sources["epilogue"] = lowered.run(late, self._live(lowered, fresh, weights))
        return [*(hand_over(r) for r in layout.results), *(fetch(r) for r in layout.extras)]

    def _lowered_body(self) -> Lowered:
        if self._body is None:
            with compiling(), self._lock:
                if self._body is None:
                    self._body = self._lower(self.program)
        return self._body

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
                layout.mask_name,
                f"shape {tuple(mask.shape)}",
                f"{tuple(tokens.shape[:2])}, the shape of the tokens",
                "Pass the mask the tokenizer returned with these tokens.",
            )

    def _why_padded(
        self, lengths: Sequence[int], holed: bool, width: int, layout: PackedLayout
    ) -> str | None:
        """Why a batch of these lengths is not worth packing, or cannot be, as a sentence; or None."""
        tokens = sum(lengths)
        if tokens < 2:
            return "The batch has fewer than two real tokens."
        if not layout.rewritten:  # else what other passes did is in the body only
            least = layout.packing.min_gain
            if tokens == len(lengths) * width and not (at_hand.is_preferred() and least <= 1):
                return "The batch has no padding."
            if least > 1 and layout.packing.gain(lengths, width) < least:
                return f"The predicted gain is below min_gain={least:g}."
        if holed and layout.windowed() and layout.packing.form == "flat":
            return "A row has holes in its mask, and a sliding window counts distances across them."
        if holed and not layout.holes:
            return (
                "A row has holes in its mask, and a part of the model that mixes positions goes on over them."
            )
        if width > layout.proven and layout.reclassify is not None:
            with compiling(), self._lock:
                if width > layout.proven:
                    if {**layout.visibilities, **layout.reclassify(width)} != layout.visibilities:
                        return "The attention mask has another form, such as a window, at this length than at shorter ones."
                    layout.proven = width
        return None

    def _misread(self, early: list[Any], packing: PackPlan, layout: PackedLayout) -> str | None:
        """Why this batch's mask does not mean what packing takes it to mean, as a sentence, or None."""
        for index in layout.masks:
            mask = early[index]
            seen = mask if mask.dtype == torch.bool else mask > -1e4
            seen = seen.expand(packing.batch, seen.shape[1], packing.width, packing.width)
            real = torch.zeros(packing.batch, packing.width, dtype=torch.bool, device=mask.device)
            real.view(-1)[packing.where] = True
            if (seen & real[:, None, :, None] & ~real[:, None, None, :]).any():
                return "The attention mask lets a real token see a pad token."
        return None

    def _run_padded(
        self, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor], reason: str
    ) -> list[Any]:
        with self._lock:
            self.counters.padded[reason] += 1
        if self._padded is None:
            with compiling(), self._lock:
                if self._padded is None:
                    padded = self.program.packing.padded
                    self._padded = (self._lower(padded), Freshness(padded, self._mode))
        lowered, fresh = self._padded
        results = lowered.run(inputs, self._live(lowered, fresh, weights))
        layout: PackedLayout = self.program.packing
        if layout.packing.outputs == "packed":
            real = inputs[layout.mask] != 0
            results = [
                r[real].unsqueeze(0) if isinstance(where, Scatter) and per_token(r) else r
                for r, where in zip(results, layout.results)
            ]
        return [*results, *(None for _ in layout.extras)]

    def _lower_prologue(self, layout: PackedLayout | None) -> Lowered | None:
        """Positions and masks run as they stand; another tower, an image's, is worth compiling."""
        if layout is None or layout.prologue is None:
            return None
        heavy = layout.prologue.nodes(*_PRODUCTS)
        return self._lower(layout.prologue) if heavy else self.plain.lower(layout.prologue)

    def _lower_epilogue(self, layout: PackedLayout | None) -> tuple[Lowered, Freshness] | None:
        if layout is None or layout.epilogue is None:
            return None
        small = len(layout.epilogue.nodes()) <= 32
        lowered = self.plain.lower(layout.epilogue) if small else self._lower(layout.epilogue)
        return lowered, Freshness(layout.epilogue, self._fresh.mode)

    def _lower(self, program: Program) -> Lowered:
        self.counters.lowered += 1
        with phase(LOWERING, self.report.phases):
            lowered = self.target.lower(program)
        if lowered.later is not None:
            self.later.append(lowered.later.told(self.report))
        self.report.engines += lowered.engines
        return lowered

    def _live(
        self, lowered: Lowered, fresh: Freshness, weights: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        tensors, repacked = fresh.tensors(lowered.weights, weights)
        if repacked:
            with self._lock:
                self.counters.repacked += repacked
        return tensors
