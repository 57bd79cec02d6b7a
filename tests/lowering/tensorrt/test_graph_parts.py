"""Programs cut into parts for engines and operators that stay compute what they computed whole."""

import json
import os
import subprocess
from pathlib import Path

import captures
import pytest
import small_programs
import torch
import zoo

import thresher
from thresher import backend
from thresher.errors import MissingDependencyError, ThresherError
from thresher.lowering.tensorrt import converters
from thresher.lowering.tensorrt.graph_parts import cut
from thresher.lowering.tensorrt.profiles import Ranges
from thresher.lowering.tensorrt.stretches import is_ours, plain
from thresher.recipe import Recipe

DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.fixture(scope="module", params=["export", "dynamo"])
def body(request):
    """A packed body, from torch.export and from Dynamo, which hands over its sizes as numbers."""
    model, inputs = zoo.ZOO["llama"].build()
    if request.param == "dynamo":
        made = thresher.compile(model, inputs, "exact", verify=False, target="reference", dynamic=True)
        return made.sessions[0].program
    program = captures.of_zoo("llama", "export-dynamic")
    recipe = Recipe.of("exact", verify=False)
    return backend.run_pipeline(program, recipe, captures.arguments(program, inputs))[0]


def run(program, given):
    """The cut program's results."""
    outer, parts, names = cut(program)
    for part in parts:
        setattr(outer, part.name, part.program.graph_module)
    return list(outer(*given, *(program.weights[n].tensor for n in names))), parts, outer


def calls(body, tokens=17):
    given = []
    for place, name in zip(body.placeholders, body.input_names):
        known = place.meta["val"]
        if name == "cu_seqlens":
            given.append(torch.tensor([0, 5, 17], dtype=torch.int32))
        elif not isinstance(known, torch.Tensor):
            given.append(12 if name == "max_len" else tokens)
        elif known.dtype == torch.int64:
            given.append(torch.randint(3, 90, (1, tokens)))
        else:
            given.append(torch.randn([s if isinstance(s, int) else tokens for s in known.shape]))
    return given


def test_our_operators_stay_and_the_rest_becomes_engines(body):
    given = calls(body)
    actual, parts, outer = run(body, given)
    assert len(parts) == 3  # before, between and behind two attentions
    assert not any("thresher" in o for part in parts for o in part.operators)
    assert sum(is_ours(n) for n in outer.graph.nodes) == 2
    for a, e in zip(actual, body.run(*given), strict=True):
        assert torch.equal(a, e)


def test_a_part_takes_tensors_alone_and_holds_its_weights(body):
    _, parts, names = cut(body)
    for part in parts:
        values = [p.meta["val"] for p in part.program.placeholders]
        assert all(isinstance(v, torch.Tensor) for v in values), "an engine takes no numbers"
        assert not set(part.program.input_names) & set(body.weights)
    held = {n for p in parts for n in p.program.weights}
    assert held | set(names) == set(body.weights)


def test_parts_have_a_profile_for_every_size_that_varies(body):
    _, parts, _ = cut(body)
    ranges = Ranges(body, {})
    for part in parts:
        shapes = ranges.shapes(part.program)
        varying = {
            n
            for p, n in zip(part.program.placeholders, part.program.input_names)
            if any(not isinstance(s, int) for s in p.meta["val"].shape)
        }
        assert set(shapes) == varying
        assert all(a <= b <= c for s in shapes.values() for a, b, c in zip(*s))


def test_a_size_that_no_tensor_of_the_part_has_is_the_length_of_one_made_for_it():
    o = torch.ops.thresher

    def function(x, y):
        z = o.hadamard(y, None, 4)
        n = x.shape[0]
        return (z.relu() + torch.arange(4)).sigmoid() * n, torch.zeros(n) + z.sum()

    x, y = torch.randn(5, 2), torch.randn(3, 4)
    program = small_programs.program(function, {"x": x, "y": y}, {}, {"x": {0: DYNAMIC}, "y": {0: DYNAMIC}})
    given = (torch.randn(7, 2), torch.randn(6, 4))
    actual, parts, _ = run(program, given)
    lengths = [n for p in parts for n in p.program.input_names if n.endswith("_length")]
    assert lengths and all(
        isinstance(p.meta["val"], torch.Tensor) for x in parts for p in x.program.placeholders
    )
    for a, e in zip(actual, program.run(*given), strict=True):
        torch.testing.assert_close(a, e)


def test_results_of_several_operators_and_pass_through():
    """A split's members, an input handed back, a weight handed back, and a result that is read by two parts."""
    o = torch.ops.thresher

    def function(x, w):
        a, b = torch.split(x @ w, 4, 1)
        a = (a.relu() * 2 + 1).sigmoid()
        c = o.hadamard(b, None, 4)
        d = (c + a).relu() + a.tanh()
        return d, x, w, a

    program = small_programs.program(function, {"x": torch.randn(3, 8)}, {"w": torch.randn(8, 8)})
    given = (torch.randn(3, 8),)
    actual, parts, _ = run(program, given)
    assert len(parts) == 2
    for a, e in zip(actual, program.run(*given), strict=True):
        assert torch.equal(a, e)


def test_short_stretches_stay_with_their_neighbours():
    o = torch.ops.thresher

    def function(x):
        y = o.hadamard(o.hadamard(x, None, 4).relu(), None, 4)
        return y.sigmoid().sigmoid().sigmoid()

    program = small_programs.program(function, {"x": torch.randn(3, 4)})
    given = (torch.randn(3, 4),)
    actual, parts, outer = run(program, given)
    assert [len(p.operators) for p in parts] == [3]
    assert sum("relu" in str(n.target) for n in outer.graph.nodes) == 1
    assert torch.equal(actual[0], program.run(*given)[0])


def test_nothing_for_an_engine_is_said():
    program = small_programs.program(
        lambda x: torch.ops.thresher.hadamard(x, None, 4), {"x": torch.randn(3, 4)}
    )
    with pytest.raises(ThresherError, match="No stretch of the program"):
        cut(program)


def test_attention_of_pytorchs_own_is_inside_unless_it_drops_out():
    attend = torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(1, 2, 5, 8)
    program = small_programs.program(lambda q: attend(q, q, q, dropout_p=0.5) + attend(q, q, q), {"q": q})
    asked = program.nodes(torch.ops.aten.scaled_dot_product_attention.default)
    assert [plain(n) for n in asked] == [False, True]


def test_what_tensorrt_has_no_type_for_stays():
    def function(x, n):
        wide = x.double().cumsum(0).float()
        return wide.relu().sigmoid().tanh(), torch.rand_like(x), (n + 1).to(torch.int8), x.nonzero()

    program = small_programs.program(function, {"x": torch.randn(3, 4), "n": torch.arange(3)})
    stay = {str(n.target).split(".")[1] for n in program.nodes() if not plain(n)}
    assert {"cumsum", "nonzero"} <= stay and stay & {"rand_like", "rand"}
    assert not stay & {"relu", "sigmoid", "tanh", "add"}


def test_without_the_package_it_says_which(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"torch-tensorrt.*thresher\[tensorrt\]"):
        converters.package()


@pytest.mark.slow
def test_torch_tensorrt_rtx_makes_an_engine_of_each_part():
    """For two GPUs that are not here: built, their kernels read, and not run."""
    python = os.environ.get("THRESHER_FX_RTX_PYTHON")
    if not python:
        pytest.skip(
            "THRESHER_FX_RTX_PYTHON names no Python that has torch-tensorrt-rtx; docs/gpu.md says how"
        )
    script = Path(__file__).resolve().parents[2] / "support" / "fake_cuda.py"
    ran = subprocess.run([python, str(script), "SM89", "SM120"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    engines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [(e["part"], e["sm"]) for e in engines] == [
        (part, sm) for sm in ("SM89", "SM120") for part in ("engine_0", "engine_1")
    ]  # before and behind the packed attention, which is ours and stays in PyTorch
    for engine in engines:
        assert engine["bytes"] > 100_000 and engine["kernels"]
    assert any("SiluMul" in k for k in engines[1]["kernels"]), "the MLP's gate is one kernel"
