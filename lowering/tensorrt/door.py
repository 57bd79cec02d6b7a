"""`target="tensorrt"`: a rewritten program as engines, with operators of ours running between them.

    program --graph_parts--> parts and what stays --export--> ONNX --build--> engine --runner--> calls
                                                  `--converters (torch-tensorrt) --'

Engines are kept in the cache by a hash of the part's graph, its weights, the sizes, the GPU and all versions. An engine
holds its weights, so each call looks whether they are the same still, and an engine with a changed one is built anew.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thresher.engine_report import EngineReport
from thresher.graph.program import Program
from thresher.graph.stamp import stamp

from ..decompose import op_name
from ..target import NATIVE, Lowered, Runtime, Target
from . import kept
from .graph_parts import Part, cut
from .options import Options
from .profiles import Ranges
from .stretches import is_ours, plain


class TensorRT(Target):
    """options: as a user gave them. runtime: which operators of ours engines hold, by its forms.

    Raises ThresherError where no engine can be made, naming what to install.
    """

    name = "tensorrt"

    def __init__(self, options: Options, runtime: Runtime):
        self.options, self.runtime = options, runtime
        self.way = options.way()

    def lower(self, program: Program) -> Lowered:
        outer, parts, outside = cut(program, self._inside)
        ranges = Ranges(program, self.options.profiles)
        engines = [EnginePart(p, ranges.shapes(p.program), self.way, self.options.build_only) for p in parts]
        for engine in engines:
            setattr(outer, engine.part.name, engine)
        names = [*outside, *dict.fromkeys(n for p in parts for n in p.program.weights if n not in outside)]

        def run(inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
            live = dict(zip(names, weights, strict=True))
            with torch.no_grad():
                for engine in engines:
                    engine.refresh(live)
                return list(outer(*inputs, *weights[: len(outside)]))

        return Lowered(self.name, names, run, [e.report for e in engines])

    def _inside(self, node: fx.Node) -> bool:
        """Whether a node belongs in an engine: plain operators, and those of ours that TensorRT has a form for."""
        if self.way != "onnx" or not is_ours(node):
            return plain(node)
        form = self.runtime.forms.get(op_name(node))
        account = form.account(node, self.runtime) if form is not None else None
        return account is not None and account[0] == NATIVE


class EnginePart(torch.nn.Module):
    """A part of a program, called with its tensors, that runs as an engine; where one is only built, in PyTorch."""

    def __init__(self, part: Part, shapes: Mapping[str, Any], way: str, build_only: str | None):
        super().__init__()
        self.part, self.shapes, self.way, self.build_only = part, shapes, way, build_only
        self._lock = threading.Lock()
        self._content = ""
        self._stamps: dict[str, Any] = {}
        self._held: dict[str, torch.Tensor] = {}  # an id in a stamp is of use while its tensor lives
        self.report = EngineReport(part.name, "", "", len(part.operators), runs=build_only is None)
        self._build()

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self._run(*tensors)

    def refresh(self, live: Mapping[str, torch.Tensor]) -> None:
        """Build the engine anew where a weight of its own is not what it was."""
        program = self.part.program
        with self._lock:
            stamps = {name: stamp(live[name]) for name in program.weights}
            if stamps == self._stamps:
                return
            for name, weight in list(program.weights.items()):
                program.weights[name] = dataclasses.replace(weight, tensor=live[name])
                program.graph_module._buffers[name] = live[name].detach()
            if kept.content(program) != self._content:
                self._build()
                self.report.rebuilt += 1
            self._stamps, self._held = stamps, {name: live[name] for name in program.weights}

    def _build(self) -> None:
        program = self.part.program
        self._content = kept.content(program)
        if self.way == "torch-tensorrt":
            from . import converters

            self._run, found = converters.build(program, self.shapes)
        else:
            found = kept.engine(program, self.shapes, self._content, self.build_only)
            self._run = self._in_pytorch if self.build_only else self._loaded(found)
        report = self.report
        report.gpu, report.builder = found.sm, f"{found.flavor} {found.version}"
        report.bytes, report.seconds, report.cached = found.bytes, found.seconds, found.cached
        report.sites, report.profiles = found.sites, {n: list(s) for n, s in self.shapes.items()}

    def _in_pytorch(self, *tensors: torch.Tensor) -> Any:
        return self.part.program.graph_module(*tensors)

    def _loaded(self, found: Any) -> Any:
        from .runner import Runner

        return Runner(found.path, self.part.program.input_names, self.shapes)
