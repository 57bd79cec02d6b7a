"""Calibration: one sweep of example batches through a Program, read by every pass that needs data.

A pass that needs data declares taps: a node of the program, and a collector for what flows there.
A Calibration runs programs batch by batch, hands every tapped value to its collector, and gives
Statistics: tensors by pass, site and name, which can be saved and are refused for a model with
other weights.

A rewrite stays a pure function of program, options and statistics, so that compiling twice from one
file of statistics gives the same program.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import fx

from thresher import tensor_files
from thresher.errors import ArgumentError, ThresherError
from thresher.graph.program import Program, weights_fingerprint
from thresher.graph.snapshot import Snapshot
from thresher.hashing import of_tensors
from thresher.recipe import Recipe

from .base import PASSES, Context, Pass
from .candidates import check_untouched
from .order import ordered
from .structure.recover import recover
from .tokens.owners import Owners

FORMAT = "thresher-statistics-1"


class Collector(Protocol):
    """Gathers what a pass needs from a tapped value, batch by batch.

    One that has `merge(other)`, which takes in what another gathered on other batches, can be used over several
    ranks; it must be possible to pickle it.
    """

    def add(self, value: torch.Tensor, real: torch.Tensor | None) -> None:
        """One batch's value. real: bool [batch, sequence], False at pads; None when all tokens are real."""

    def result(self) -> dict[str, torch.Tensor]:
        """What was gathered, by name."""


@dataclass(frozen=True)
class Tap:
    """A place to look at.

    site: the name the pass will look its statistics up by. node: in the program. make: a new collector;
    graphs of other shapes share the one made first for a site.
    """

    site: str
    node: fx.Node
    make: Callable[[], Collector]


@dataclass
class Statistics(Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]]):
    """Tensors by pass, then site, then name. fingerprint: of the weights they were measured on."""

    fingerprint: str
    tensors: dict[str, dict[str, dict[str, torch.Tensor]]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Mapping[str, Mapping[str, torch.Tensor]]:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check(self, program: Program) -> None:
        """Raise when these were measured on other weights than the program's."""
        found = weights_fingerprint(program)
        if found != self.fingerprint:
            raise ThresherError(
                f"The calibration statistics were measured on weights {self.fingerprint}, and this model's are "
                f"{found}. Calibrate this model, or compile the one that was calibrated."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, tensor after tensor; the old one stays whole until the new one is complete."""
        path = Path(path)
        names = [[p, s, n] for p, sites in self.tensors.items() for s, named in sites.items() for n in named]
        flat = {str(i): self.tensors[p][s][n] for i, (p, s, n) in enumerate(names)}
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "names": json.dumps(names)}
        metadata["sha256"] = _digest(flat, metadata)
        tensor_files.write(path, [(k, t.dtype, t.shape) for k, t in flat.items()], flat.__getitem__, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote. Raises ArgumentError for any other file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}")
                found, flat = cls(metadata["fingerprint"]), {}
                for index, (p, s, n) in enumerate(json.loads(metadata["names"])):
                    flat[str(index)] = file.get_tensor(str(index))
                    found.tensors.setdefault(p, {}).setdefault(s, {})[n] = flat[str(index)]
                if "sha256" in metadata and metadata["sha256"] != _digest(
                    flat, metadata
                ):  # older files have none
                    raise ValueError("it was changed since it was written: its checksum differs")
                return found
        except Exception as reason:
            raise ArgumentError(
                "stats",
                f"{path} ({reason})",
                "a file written by thresher.calibrate(...).save(path)",
                "Calibrate the model and save its statistics first.",
            ) from None


def _digest(flat: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    return of_tensors(flat.items(), *(metadata[key] for key in ("format", "fingerprint", "names")))


class Calibration:
    """Gathers what a recipe's passes ask for, over any number of programs of one model.

    calibration = Calibration(recipe)
    watched = calibration.watch(program)
    calibration.run(watched, inputs, real)      # for each batch; gives the program's results
    statistics = calibration.statistics()
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.batches = 0
        self._collectors: dict[tuple[str, str], Collector] = {}
        self._fingerprint = ""

    def watch(self, program: Program) -> Watched:
        """Find the taps of every pass. Raises ThresherError when no pass of the recipe needs data."""
        fingerprint, program = weights_fingerprint(program), self._prepared(program)
        structure = functools.lru_cache(lambda: recover(program))
        readers: dict[fx.Node, list[Collector]] = {}
        for config in self.recipe.passes:
            context, before = Context(self.recipe, config, structure=structure), Snapshot(program)
            taps = list(PASSES[config.name].taps(program, context))
            check_untouched(config.name, "taps", before, program)
            for tap in taps:
                key = (config.name, tap.site)
                if key not in self._collectors:
                    self._collectors[key] = tap.make()
                readers.setdefault(tap.node, []).append(self._collectors[key])
        if not readers:
            names = ", ".join(c.name for c in self.recipe.passes) or "none"
            raise ThresherError(
                f"No pass of this recipe needs data from this model. The recipe runs: {names}."
            )
        self._fingerprint = fingerprint
        return Watched(program, readers, Owners(program))

    def _prepared(self, program: Program) -> Program:
        """A copy as the passes that look at data have it when they come to match."""
        program = program.copy()
        for config in ordered(self.recipe):
            rewriter = PASSES[config.name]
            if type(rewriter).taps is not Pass.taps:
                rewriter.prepare(program, Context(self.recipe, config, structure=lambda: recover(program)))
        program.clean()
        return program

    def run(self, watched: Watched, inputs: Sequence[Any], real: torch.Tensor | None) -> list[Any]:
        """One batch through a watched program. inputs: its placeholders' values. real: see Collector; of the input that
        `attention_mask` belongs to, while other sequences, such as a decoder's, have masks of their own among the inputs.
        """
        self.batches += 1
        with torch.no_grad():
            return list(_Sweep(watched, real, dict(zip(watched.program.input_names, inputs))).run(*inputs))

    def gather(self, group: Any) -> None:
        """Take in what the other ranks of a process group gathered, each on batches of its own.

        Every rank of the group must call it, and all have the same afterwards. Raises ThresherError, on all ranks,
        when they do not have the same weights, or when a pass gathers what cannot be merged.
        """
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (self._fingerprint, self.batches, self._collectors), group=group)
        prints = {fingerprint for fingerprint, batches, _ in everyone if batches}
        if len(prints) > 1:
            raise ThresherError(f"The ranks calibrate different weights: {', '.join(sorted(prints))}.")
        merged: dict[tuple[str, str], Collector] = {}
        for _, _, collectors in everyone:  # in rank order on every rank, so that all round alike
            for (name, site), theirs in collectors.items():
                mine = merged.setdefault((name, site), theirs)
                if mine is theirs:
                    continue
                if not hasattr(mine, "merge"):
                    raise ThresherError(
                        f"What {name} gathers at {site} cannot be merged over ranks. Calibrate it on one rank."
                    )
                mine.merge(theirs)
        self._fingerprint, self._collectors = next(iter(prints), ""), merged
        self.batches = sum(batches for _, batches, _ in everyone)

    def statistics(self) -> Statistics:
        """What was gathered so far. Raises ThresherError when there was not a single batch."""
        if not self.batches:
            raise ThresherError("There was not a single batch to calibrate on.")
        found = Statistics(self._fingerprint)
        for (name, site), collector in self._collectors.items():
            found.tensors.setdefault(name, {})[site] = collector.result()
        return found


@dataclass(frozen=True)
class Watched:
    """A program, and the collectors that look at its nodes."""

    program: Program
    readers: Mapping[fx.Node, list[Collector]]
    owners: Owners


class _Sweep(fx.Interpreter):
    """Runs a program and shows tapped values to their collectors."""

    def __init__(self, watched: Watched, real: torch.Tensor | None, inputs: Mapping[str, Any]):
        super().__init__(watched.program.graph_module)
        self.readers, self.real, self.owners, self.inputs = watched.readers, real, watched.owners, inputs

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for collector in self.readers.get(n, ()):
            usual = self.owners.mask(n) == "attention_mask"
            collector.add(result, self.real if usual else self.owners.real(n, self.inputs))
        return result
