"""A loaded artifact: called like the model, with results by name."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from thresher import waiting
from thresher.errors import ThresherError
from thresher.graph.program import Program
from thresher.graph.tracing import compiling
from thresher.lowering import catalog
from thresher.lowering.inductor import aoti, later
from thresher.lowering.reference import Reference
from thresher.lowering.target import Lowered, Target
from thresher.reading import reading
from thresher.report import Report

from ..call_session import CallSession, Key
from ..session import Counters, Session
from .archive import SAVE_AGAIN
from .fakes import materialise, materialise_for_compiler
from .program_json import ArtifactError
from .signature import bind


class Result(dict[str, Any]):
    """A call's results by name; a name that is an identifier is an attribute too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"There is no result {name!r}; there are {', '.join(self)}.")


class Loaded:
    """Runs a saved program. The first call lowers it, and does not wait for a compiler unless `wait` says so: it runs the
    program node by node, and the compiler works in the background.

    program: the graph and its weights. manifest: what the file says about itself. others, whole: see
        `runtime.artifact.write`. path: where it came from, for errors.
    """

    def __init__(
        self,
        program: Program,
        manifest: Mapping[str, Any],
        target: str,
        machine_code: bytes | None = None,
        others: Mapping[Key, Program] | None = None,
        whole: Program | None = None,
        path: Any = "The file",
        options: Mapping[str, Any] | None = None,
        wait: bool = False,
    ):
        self.path, self._wait = path, wait
        self._others, self._whole = others, whole
        self.program, self.manifest, self.target = program, manifest, target
        self.report = (
            Report.from_dict(manifest["report"]) if manifest["report"] is not None else Report("none")
        )
        self.report.engines.clear()  # of the machine that saved it
        self._options = dict(options or {})
        self._code = machine_code
        self._session: Session | None = None
        self._lock = threading.Lock()
        outside = program.packing.padded if program.packing is not None else program
        self._symbols = outside.graph_module.meta["symbols"]

    @property
    def input_names(self) -> list[str]:
        return [e["name"] for e in self.manifest["inputs"] if e["kind"] == "tensor"]

    @property
    def output_names(self) -> list[str]:
        return list(self.manifest["outputs"])

    @property
    def counters(self) -> Counters:
        return self.session.counters

    @property
    def session(self) -> Session:
        """What runs the program; made when first asked for."""
        if self._session is not None:
            return self._session
        with compiling(), self._lock:
            if self._session is None:
                given = (self.program, self._lowering(), Reference(), self.report, "trust")
                if self._whole is None:
                    self._session = Session(*given)
                else:
                    self._session = CallSession(*given, kept=self._others, whole=self._whole)
            return self._session

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Run on the model's inputs, by name or in order."""
        inputs = bind(self.manifest["inputs"], self.manifest["relations"], self._symbols, args, kwargs)
        try:
            with torch.no_grad(), waiting.at_once(waiting.NO if self._wait else waiting.SOON):
                results = self.session(inputs, {})
            if any(one.early for one in self.session.later):
                later.begin()
        except ThresherError:
            raise
        except Exception:
            self._blame()
            raise
        if len(results) != len(self.output_names):
            given = f"{len(self.output_names)} names for the program's {len(results)} results"
            raise ArtifactError(f"{self.path} was altered: it has {given}. {SAVE_AGAIN}")
        return Result(zip(self.output_names, results, strict=True))

    def _blame(self) -> None:
        """Raise ArtifactError where a call failed because the program in the file can run on no input."""
        layout = self.program.packing
        parts = [layout.prologue, layout.epilogue, layout.padded] if layout is not None else []
        for program in [self.program, *parts, self._whole]:
            if program is not None:
                with reading(self.path, "a program that can be run", SAVE_AGAIN, ArtifactError):
                    materialise(program)

    def _lowering(self) -> Target:
        if self._code is not None:
            return _Compiled(self.program, self._code)
        lower = catalog.runtime(self.target, lowers=True).lower
        assert lower is not None
        return OnFakes.around(lower(self._options, None))


class OnFakes(Target):
    """Another target, for programs whose fake tensors were left out of a file."""

    def __init__(self, target: Target):
        self._target, self.name = target, target.name  # type: ignore[misc]

    @classmethod
    def around(cls, target: Target) -> Target:
        """The target that takes such programs; one that reads no fake tensors does as it is."""
        return target if target.fakes == "none" else cls(target)

    def lower(self, program: Program) -> Lowered:
        fill = materialise_for_compiler if self._target.fakes == "ends" else materialise
        return self._target.lower(fill(program))


class _Compiled(Target):
    """The machine code of the body; the parts around it, for which there is none, run plainly."""

    name = "compiled"

    def __init__(self, body: Program, code: bytes):
        self._body, self._code = body, code

    def lower(self, program: Program) -> Lowered:
        if program is self._body:
            return aoti.load(self._code, program)
        return Reference().lower(program)
