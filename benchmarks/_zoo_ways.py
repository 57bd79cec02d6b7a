"""How a class of the zoo is run: by every recipe from one trace, and what two ways' results differ by.

Dynamo traces a model once for all recipes in fp32: the backend here compiles each graph several ways and runs the one
that is asked for, so that a class costs one trace and not four.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from thresher import sessions
from thresher.backend import thresher_backend
from thresher.graph.capture import places_of
from thresher.graph.program import Program
from thresher.runtime.session import Session

WAYS: dict[str, dict[str, Any]] = {
    "default": {"prepack": True},
    "nvfp4": {"nvfp4": {"min_weights": 0, "budget": 99.0}, "min_gain": 0.0, "verify": False},
}
"""Recipes by the name of their check, all on the reference target."""


@contextlib.contextmanager
def alone() -> Iterator[list[warnings.WarningMessage]]:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        yield said


def said_of(reason: BaseException) -> str:
    lines = [line for line in str(reason).splitlines() if line.strip()] or [""]
    return f"{type(reason).__name__}: {lines[0][:300]}"


def _outputs(result: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def difference(got: Any, want: Any, given: dict[str, Any], pooled: bool = True) -> float:
    """Largest difference over outputs, relative to each one's largest value, at real tokens where it has tokens.

    pooled: look also at outputs [rows, width], which a model may have read from a pad.
    """
    mask = given.get("attention_mask")
    worst = 0.0
    for a, b in zip(_outputs(got), _outputs(want), strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not pooled and b.dim() == 2 and len(b) == len(mask) and b.shape != mask.shape:
            continue
        if mask is not None and b.dim() >= 2 and b.shape[:2] == mask.shape:  # no decoder's is as long
            a, b = a[mask.bool()], b[mask.bool()]
        known = torch.isfinite(b)
        if not known.any():
            continue
        a, b = a[known].float(), b[known].float()
        gap = (a - b).abs().max()
        worst = max(worst, float("inf") if gap.isnan() else float(gap / b.abs().max().clamp_min(1e-6)))
    return worst


class Ways:
    """A backend of Dynamo that compiles each graph by every recipe and runs the one named in `way`.

    accounts: reports by recipe, one for each graph. failed: what a recipe raised. warned: its warnings. ran: of each graph
    the session of the last recipe and the inputs of its last call.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.way, self.names = "eager", names
        self.accounts: dict[str, list[Any]] = {n: [] for n in names}
        self.failed: dict[str, str] = {}
        self.warned: dict[str, list[str]] = {n: [] for n in names}
        self.held: list[set[str]] = []  # what each graph multiplies by, or reads
        self.programs: list[Program] = []  # each graph as captured
        self.ran: list[tuple[Session, list[Any]]] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        made: dict[str, Callable[..., Any]] = {"eager": gm.forward}
        for name in self.names:
            with warnings.catch_warnings(record=True) as said, sessions.collect() as built:
                warnings.simplefilter("always")
                try:
                    made[name] = thresher_backend(
                        gm, example_inputs, options={**WAYS[name], "target": "reference"}
                    )
                except Exception as reason:
                    self.failed.setdefault(name, said_of(reason))
            self.warned[name] += [str(w.message) for w in said if "thresher" in str(w.message)]
            self.accounts[name] += [s.report for s in built]
            if name == self.names[-1]:
                self.programs += [s.captured for s in built]
                self.ran += [(s, []) for s in built]
            if name == "nvfp4":
                self.held += [{w.fqn for w in s.captured.weights.values()} for s in built]

        held = self.ran[-1][1] if self.ran else []
        takes = [i for i, r in enumerate(places_of(gm, example_inputs).roles) if r.startswith("input:")]

        def call(*args: Any) -> Any:
            held[:] = [args[i] for i in takes]
            return made.get(self.way, gm.forward)(*args)

        return call

    def faults(self) -> list[str]:
        """What a recipe raised, or ran without by a fault of its own."""
        own = [
            w
            for said in self.warned.values()
            for w in said
            if "fault of its own" in w or "left out a pass" in w
        ]
        return [*self.failed.values(), *own]


def packing(ways: Ways) -> dict[str, Any]:
    """Whether the default recipe packed a graph, or why not."""
    accounts = [r["prepack"] for r in ways.accounts["default"] if any(p.name == "prepack" for p in r.passes)]
    packed = any(a.rewritten for a in accounts)
    reasons = [m.reason for a in accounts for m in a.missed] + [
        f"It was rolled back: {a.rolled_back}" for a in accounts if a.rolled_back
    ]
    said = "packed" if packed else (reasons or ways.warned["default"] or ["no graph of it was looked at"])[0]
    back = [str(a.rolled_back) for a in accounts if a.rolled_back]
    found = {"packed": packed, "prepack": said[:600], "graphs": len(accounts)}
    return {**found, "rolled_back": back} if back else found
