"""Keeps rewritten programs on the disk, so that a second process does not capture, rewrite and prove them again.

An entry holds what the passes made and the account of it, certificate included, under a name made of all that
decided it (`rewrite_key`); weights are not in it. The report of a program that came from here says so, and when
it was proven. `THRESHER_REWRITE_CACHE=0` switches it off. Kept are programs on a CPU that prepacking rewrote and
whose weights are the model's own; others are made anew, as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from thresher.runtime.artifact import archive, expressions
from thresher.runtime.artifact.layout_json import decode_layout, encode_layout
from thresher.runtime.artifact.program_json import decode, encode
from thresher.runtime.artifact.tensor_file import Pool, parse

from ..files import cache_folder, no_cache, scratch, trusted
from ..graph.capture import Places
from ..graph.packed_layout import Visibility
from ..graph.program import Program
from ..recipe import Recipe
from ..records.certificate import Certificate, plain
from ..report import Report
from . import rewrite_key
from .rewrite_key import SWITCH, Unnamed

FORMAT = 1
MOST = 256  # entries; the oldest go first
MOST_BYTES = 1 << 26  # of constants in one entry
_TENSORS, _PROGRAMS = "constants.safetensors", "programs.json"
_DECIDED_BY_DATA = re.compile(r"\bu\d+\b")
_log = logging.getLogger(__name__)


@dataclass
class Kept:
    """A program as it was rewritten earlier, and as it was captured; without fake tensors on their nodes."""

    program: Program
    captured: Program
    report: Report
    certificate: Certificate


class Entry:
    """The place of one graph's rewritten program. Nothing that goes wrong with it is an error: there is no entry."""

    def __init__(self, path: Path, places: Places):
        self.path, self.places = path, places
        self._before = rewrite_key.environment(places)

    @classmethod
    def of(
        cls, gm: fx.GraphModule, places: Places, inputs: Sequence[Any] | None, recipe: Recipe, target: str
    ) -> Entry | None:
        """None where the cache is off, or what is to be rewritten cannot be named."""
        if os.environ.get(SWITCH) == "0" or "prepack" not in [c.name for c in recipe.passes]:
            return None
        try:
            name = rewrite_key.name(gm, places, inputs, recipe, target)
        except Unnamed as reason:
            _log.info("this graph's rewritten program is not kept: %s", reason)
            return None
        folder = cache_folder("rewritten")
        return None if folder is None else cls(folder / name, places)

    def find(self) -> Kept | None:
        """What was kept, or None where nothing was, where it is damaged, or where it is not ours to trust."""
        if not trusted(self.path):
            return None
        try:
            with archive.opened(self.path) as (file, found):
                manifest = archive.manifest_of(found, self.path)
                members = {
                    n: archive.member(file, found, manifest, n, self.path) for n in (_TENSORS, _PROGRAMS)
                }
            if manifest["format"] != FORMAT:
                return None
            tensors = [*self._weights(), *parse(members[_TENSORS], manifest["strides"])]
            programs = json.loads(members[_PROGRAMS].numpy().tobytes())
            program, captured = decode(programs["body"], tensors), decode(programs["captured"], tensors)
            program.packing = decode_layout(programs["layout"], tensors)
            report, certificate = (
                Report.from_dict(manifest["report"]),
                Certificate.from_dict(manifest["certificate"]),
            )
            if not self._assume(manifest["guards"], manifest["after"]):
                return None
        except Exception as reason:  # what a damaged file raises has no bounds
            _log.info("%s is left aside: %s", self.path, reason)
            return None
        note = (
            f"The rewritten program and its proof were taken from the cache, made at {certificate.created} from the "
            f"same graph, weights, inputs, recipe and versions on a machine like this; {SWITCH}=0 makes them anew."
        )
        report.notes.append(note)
        certificate = dataclasses.replace(certificate, notes=(*certificate.notes, note))
        with contextlib.suppress(OSError):
            os.utime(self.path)
        return Kept(program, captured, report, certificate)

    def keep(self, captured: Program, rewritten: Program, report: Report, certificate: Certificate) -> None:
        """Write the entry, if the program is of the kind that can be kept."""
        pool, weights = Pool(), self._weights()
        numbers = {id(t): i for i, t in reversed(list(enumerate(weights)))}

        def hold(tensor: torch.Tensor) -> int:
            known = numbers.get(id(tensor))
            return known if known is not None else len(weights) + pool.hold(tensor)

        try:
            _check_kind(captured, rewritten)
            guards, after = self._assumed()
            programs = {
                "body": encode(rewritten, hold),
                "captured": encode(captured, hold),
                "layout": encode_layout(rewritten.packing, hold),
            }
            if pool.bytes() > MOST_BYTES:
                raise Unnamed(f"Its constants take {pool.bytes()} bytes.")
            text = json.dumps(programs).encode()
            manifest = {
                "format": FORMAT,
                "guards": guards,
                "after": after,
                "strides": pool.strides(),
                "report": dataclasses.replace(report, engines=[]).to_dict(),  # a target builds its own
                "certificate": plain(certificate.to_dict()),
            }
            with scratch(self.path.parent) as made, open(made / self.path.name, "wb") as file:
                archive.write(file, {_TENSORS: pool.chunks(), _PROGRAMS: iter([memoryview(text)])}, manifest)
                file.close()
                os.chmod(file.name, 0o600)
                os.replace(file.name, self.path)
            _drop_oldest(self.path.parent)
        except OSError as reason:
            no_cache(self.path, reason)
        except Exception as reason:  # the program runs all the same, and the next process makes its own
            _log.info("this graph's rewritten program is not kept: %s", reason)

    def _weights(self) -> list[torch.Tensor]:
        return [tensor for _, tensor in self.places.weights.values()]

    def _assumed(self) -> tuple[list[str], dict[str, list[str]]]:
        """What capturing and rewriting assumed of the sizes, for Dynamo to check at each call; and the state then."""
        after = rewrite_key.environment(self.places)
        before = self._before.get("guards", [])
        guards = after.get("guards", [])
        if guards[: len(before)] != before or not all(expressions.readable(g) for g in guards[len(before) :]):
            raise Unnamed("An assumption about the sizes is no expression that a file can hold.")
        return guards[len(before) :], self._without_new(after)

    def _assume(self, guards: Sequence[str], after: dict[str, list[str]]) -> bool:
        """Let Dynamo check what was assumed then; False where the assumptions come out otherwise now."""
        sizes = _symbols(self.places)
        held = all(bool(expressions.evaluate(guard, sizes)) for guard in guards)
        return held and self._without_new(rewrite_key.environment(self.places)) == after

    def _without_new(self, state: dict[str, list[str]]) -> dict[str, list[str]]:
        """A state without the sizes that only data decide and that came with tracing: they are the program's own, made
        again with its fake tensors, and no call is checked for them."""
        known = set(_DECIDED_BY_DATA.findall(str(self._before)))
        return {
            kind: [entry for entry in entries if known.issuperset(_DECIDED_BY_DATA.findall(entry))]
            for kind, entries in state.items()
        }


def later_masks(
    captured: Program, again: Callable[[Program], Program]
) -> Callable[[int], dict[str, Visibility]]:
    """A layout's `reclassify` for a program from the cache, whose masks are at hand only once it is rewritten again.

    again: rewrites the captured program. It runs at the first batch that is longer than what was proven.
    """
    found: list[Any] = []

    def reclassify(length: int) -> dict[str, Visibility]:
        if not found:
            layout = again(captured).packing
            found.append(layout.reclassify if layout is not None else None)
        return found[0](length) if found[0] is not None else {"": Visibility("unknown")}

    return reclassify


def _check_kind(captured: Program, rewritten: Program) -> None:
    """Raise Unnamed for a program that more belongs to than a file can hold."""
    layout = rewritten.packing
    if layout is None or rewritten.calls is not None:
        raise Unnamed(
            "Only packed programs are kept, and of these none that depends on each call (transprune, zipvl)."
        )
    for program in (captured, rewritten, layout.prologue, layout.epilogue, layout.padded):
        made = (
            next((w.fqn for w in program.weights.values() if w.source), None) if program is not None else None
        )
        if made is not None:
            raise Unnamed(
                f"{made} was computed from the model's weights, and is computed anew when those change."
            )


def _symbols(places: Places) -> dict[str, Any]:
    """Each size that may vary, by its name."""
    found: dict[str, Any] = {}
    for fake in places.fakes:
        for size in fake.shape if isinstance(fake, torch.Tensor) else [fake]:
            if isinstance(size, torch.SymInt):
                found.setdefault(str(size.node.expr), size)
    return found


def _drop_oldest(folder: Path) -> None:
    entries = sorted(
        (p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.stat().st_mtime
    )
    for path in entries[:-MOST]:
        path.unlink(missing_ok=True)
