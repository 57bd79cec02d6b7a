"""Engines of parts, built through ONNX and kept in the cache, which holds nothing that another user could have put there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import tracing

from thresher.files import cache_folder, keep, trusted
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.hashing import of_tensors

from ..onnx.export import export
from . import build as tensorrt_build
from . import engine as engines

_FORMAT = "2"  # of what is kept; another after a change to what engines are made of


def content(program: Program) -> str:
    """A hash of a part's graph and of its weights' values."""
    named = [(name, w.tensor) for name, w in program.weights.items()]
    seen: dict[str, str] = {}  # Dynamo numbers sizes as it likes
    text = re.sub(r"\b[su]\d+\b", lambda m: seen.setdefault(m[0], f"size{len(seen)}"), program.text())
    return of_tensors(named, _FORMAT, text)


def engine(
    program: Program, shapes: Mapping[str, Any], content: str, build_only: str | None
) -> engines.Engine:
    """The engine of a part, out of the cache or built. shapes: the three shapes of each input that varies.

    Raises PrecisionError where it does not compute in what the program promises, ThresherError where none was built.
    """
    sm, gpu = gpu_of(build_only)
    python = engines.builder()
    told = json.dumps(
        [_FORMAT, content, sm, gpu, shapes, engines.versions(python), torch.__version__], sort_keys=True
    )
    folder = cache_folder("engines")
    name = hashlib.sha256(told.encode()).hexdigest()[:32]
    account, plan = ((folder / f"{name}.{end}") if folder is not None else None for end in ("json", "plan"))
    if account is not None and plan is not None and trusted(account) and trusted(plan):
        found = json.loads(account.read_text())
        found["kernels"] = [tensorrt_build.Kernel(**k) for k in found["kernels"]]
        return engines.Engine(**{**found, "path": str(plan), "cached": True, "seconds": 0.0})
    with tempfile.TemporaryDirectory(prefix="thresher-engine-") as scratch:
        with tracing(
            None
        ):  # inside a compilation of Dynamo's, torch's exporter would take its fake tensors for its own
            record = export(on_cpu(program), Path(scratch) / "part.onnx", runtime="tensorrt")
        asked = {n: s for n, s in shapes.items() if n in record.inputs}
        made = engines.build(record.path, Path(scratch) / "part.plan", sm, asked)
        made.sites = _by_fqn(made.sites, record.products, program)
        if account is not None and plan is not None:
            data = Path(made.path).read_bytes()
            keep(plan, data)
            keep(account, json.dumps(dataclasses.asdict(made)).encode())
            return dataclasses.replace(made, path=str(plan))
        lasting = Path(tempfile.mkdtemp(prefix="thresher-engine-")) / "part.plan"
        lasting.write_bytes(Path(made.path).read_bytes())
        return dataclasses.replace(made, path=str(lasting))


def gpu_of(build_only: str | None) -> tuple[str, str]:
    """What is built for: the capability, and the GPU's name where one is at hand."""
    if build_only is not None:
        return build_only, ""
    major, minor = torch.cuda.get_device_capability()
    return f"SM{major}{minor}", torch.cuda.get_device_name()


def _by_fqn(sites: Mapping[str, str], weights: Mapping[str, str], program: Program) -> dict[str, str]:
    """Products by their weights' names in the model; those by no weight are left out.

    weights: the weight of each product in the file, where a quantized one is called by its node.
    """
    origins = {}
    for node in program.nodes():
        read = [program.weight(a) for a in node.all_input_nodes]
        names = [fqn for w in read if w is not None for fqn in w.origins]
        if names:
            origins[node.name] = names[0]
    named = {layer: weights[layer] for layer in sites if layer in weights}
    return {origins.get(name.rsplit(".", 1)[0], name): sites[layer] for layer, name in named.items()}


def on_cpu(program: Program) -> Program:
    """The same program with all its tensors in the main memory, where it is exported; itself where it is there."""
    values = [value(n) for n in program.graph.nodes]
    if all(v.device.type == "cpu" for v in values if isinstance(v, torch.Tensor)):
        return program
    copy = program.copy()
    cpu, mode = torch.device("cpu"), program.fake_mode()
    for name, weight in copy.weights.items():
        copy.weights[name] = dataclasses.replace(weight, tensor=weight.tensor.detach().cpu())
        copy.graph_module._buffers[name] = copy.weights[name].tensor
    for node in copy.graph.nodes:
        node.args, node.kwargs = (
            torch.utils._pytree.tree_map_only(torch.device, lambda _: cpu, given)
            for given in (node.args, node.kwargs)
        )
    with mode, torch.no_grad(), enable_python_dispatcher():
        given = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in map(value, copy.placeholders)
        ]
        _Fakes(copy.graph_module, mode).run(*given)
    copy.graph_module.recompile()
    return copy


class _Fakes(fx.Interpreter):
    """Runs a graph on fakes and keeps what each node gave."""

    def __init__(self, module: fx.GraphModule, mode: Any):
        super().__init__(module)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            result = self.mode.from_tensor(getattr(self.module, str(n.target)), static_shapes=True)
        else:
            result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result
