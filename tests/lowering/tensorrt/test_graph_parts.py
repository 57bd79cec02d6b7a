"""Programs cut into parts for engines and parts for PyTorch compute what they computed whole."""

import json
import os
import subprocess
from pathlib import Path

import captures
import pytest
import torch
import zoo

from thresher import backend
from thresher.errors import MissingDependencyError
from thresher.lowering.tensorrt import graph_parts as torch_tensorrt
from thresher.recipe import Recipe


@pytest.fixture(scope="module")
def body():
    program = captures.of_zoo("llama", "export-dynamic")
    _, inputs = zoo.ZOO["llama"].build()
    return backend.run_pipeline(
        program, Recipe.of("exact", verify=False), captures.arguments(program, inputs)
    )[0]


def test_our_operators_stay_in_pytorch_and_the_rest_becomes_engines(body):
    built = []

    def build(part, inputs):
        built.append((part, inputs))
        return part

    lowered = torch_tensorrt.TorchTensorRT(build).lower(body)
    assert len(built) == 3  # before, between and behind two attentions
    assert not any("thresher" in str(n.target) for part, _ in built for n in part.graph.nodes)
    assert all(len(inputs) == sum(n.op == "placeholder" for n in part.graph.nodes) for part, inputs in built)
    tokens = 17
    given = []
    for place, name in zip(body.placeholders, body.input_names):
        known = place.meta["val"]
        if name == "cu_seqlens":
            given.append(torch.tensor([0, 5, 17], dtype=torch.int32))
        elif name == "max_len":
            given.append(12)
        elif known.dtype == torch.int64:
            given.append(torch.randint(3, 90, (1, tokens)))
        else:
            given.append(torch.randn([s if isinstance(s, int) else tokens for s in known.shape]))
    weights = [body.weights[n].tensor for n in lowered.weights]
    for actual, expected in zip(lowered.run(given, weights), body.run(*given), strict=True):
        assert torch.equal(actual, expected)


def test_short_stretches_stay_with_their_neighbours():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    o, aten = torch.ops.thresher, torch.ops.aten
    y = graph.call_function(o.hadamard.default, (x, None, 4))
    y = graph.call_function(aten.relu.default, (y,))
    y = graph.call_function(o.hadamard.default, (y, None, 4))
    for _ in range(3):
        y = graph.call_function(aten.sigmoid.default, (y,))
    graph.output((y,))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    divided, parts = torch_tensorrt.cut(module)
    assert [(p.where, len(p.operators)) for p in parts] == [("torch", 3), ("engine", 3)]
    given = torch.randn(3, 4)
    assert torch.equal(divided(given)[0], module(given)[0])


def test_without_the_package_it_says_which(monkeypatch, body):
    monkeypatch.setattr(torch_tensorrt.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in torch_tensorrt.unavailable()
    with pytest.raises(MissingDependencyError, match="torch-tensorrt"):
        torch_tensorrt.TorchTensorRT().lower(body)


def test_an_engines_part_reads_its_sizes_and_holds_its_weights(body):
    divided, parts, names = torch_tensorrt.prepare(body)
    for part in (p for p in parts if p.where == torch_tensorrt.ENGINE):
        inner = getattr(divided, part.name)
        given = [n.meta["val"] for n in inner.graph.nodes if n.op == "placeholder"]
        assert all(isinstance(g, torch.Tensor) for g in given), "an engine takes no numbers"
        assert not {n.name for n in inner.graph.nodes if n.op == "placeholder"} & set(names)
    assert any(
        "sym_size" in o for p in parts for o in [str(n.target) for n in getattr(divided, p.name).graph.nodes]
    )


@pytest.mark.slow
def test_torch_tensorrt_rtx_makes_an_engine_of_each_part():
    """For two GPUs that are not here: built, their kernels read, and not run."""
    python = os.environ.get("THRESHER_FX_RTX_PYTHON")
    if not python:
        pytest.skip(
            "THRESHER_FX_RTX_PYTHON names no Python that has torch-tensorrt-rtx; docs/lowering.md says how"
        )
    script = Path(__file__).resolve().parents[2] / "support" / "fake_cuda.py"
    ran = subprocess.run([python, str(script), "SM89", "SM120"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    engines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [(e["part"], e["sm"]) for e in engines] == [
        (part, sm) for sm in ("SM89", "SM120") for part in ("submod_0", "submod_2")
    ]  # before and behind the packed attention, which is ours and stays in PyTorch
    for engine in engines:
        assert engine["bytes"] > 100_000 and engine["kernels"]
    assert any("SiluMul" in k for k in engines[1]["kernels"]), "the MLP's gate is one kernel"
