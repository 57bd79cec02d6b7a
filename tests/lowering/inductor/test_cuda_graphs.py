"""What a CUDA graph needs of a compiled program, so far as that can be told without a GPU."""

import ast
from pathlib import Path

import blocks
import pytest
import torch

from thresher.lowering.inductor.inductor import Inductor

KERNELS = Path(__file__).resolve().parents[3] / "kernels"
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "bounds", "unique", "masked_select"}


@pytest.fixture
def compiled(monkeypatch):
    """Graphs as Inductor is given them, with its settings, instead of their compilation."""
    from torch._inductor import compile_fx, config

    seen = []

    def inner(module, inputs, **given):
        seen.append((module, inputs, {**given, "max_autotune": config.max_autotune}))
        return module.forward

    monkeypatch.setattr(compile_fx, "compile_fx_inner", inner)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [blocks.packed, lambda: blocks.nvfp4(blocks.half()[0])], ids=["packed", "nvfp4"]
)
def test_weights_stay_where_they_are_and_no_operator_waits_for_the_host(make, compiled):
    """A replay copies each input that is not static; a graph cannot hold what reads a value or moves to a CPU."""
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    lowered = Inductor(mode="max-autotune").lower(make())
    ((module, inputs, given),) = compiled
    weights = range(len(inputs) - len(lowered.weights), len(inputs))
    assert list(given["static_input_idxs"]) == list(weights) and len(weights) > 5
    assert get_first_incompatible_cudagraph_node(module) is None
    own = {n.target for n in module.graph.nodes if getattr(n.target, "namespace", "") == "thresher"}
    assert own and not any(a.alias_info for t in own for a in t._schema.arguments)


@pytest.mark.parametrize(("mode", "graphs"), [("max-autotune", True), ("max-autotune-no-cudagraphs", False)])
def test_a_mode_of_torch_compile_reaches_inductor(mode, graphs, compiled):
    model, x = torch.nn.Linear(8, 4).eval(), torch.randn(3, 8)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(match="rewrote nothing"):
        result = torch.compile(model, backend="thresher", mode=mode)(x)
    torch.testing.assert_close(result, model(x))
    ((_, _, given),) = compiled
    assert given["max_autotune"] and bool(given["cudagraphs"]) == graphs
    assert list(given["static_input_idxs"]) == [1, 2]


def test_launching_a_kernel_reads_no_value():
    """The host code around kernels for GPUs never waits for the device; offsets stay there too."""
    found = []
    for path in [*KERNELS.rglob("cuda.py"), *KERNELS.rglob("triton_kernels.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found += [f"{path.relative_to(KERNELS)}:{node.lineno} calls {name}"] if name in READS else []
    assert not found, found
    assert len(list(KERNELS.rglob("cuda.py"))) >= 6
