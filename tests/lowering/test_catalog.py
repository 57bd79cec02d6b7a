"""Adding a target is its own folder and one line of the catalog, and nothing asks for a target's name."""

import ast
import sys
import textwrap
from pathlib import Path

import masks
import pytest
import torch
import zoo

import thresher
import thresher.lowering
from thresher import ops
from thresher.errors import ArgumentError
from thresher.lowering import catalog
from thresher.lowering.coverage import coverage

FOLDER = '''
"""An interpreter that knows ATen alone, and cumulative sums not even then."""

import torch

from thresher.lowering.decompose import decompose
from thresher.lowering.target import NATIVE, Form, Lowered, Runtime, Target, lift_weights


class Interpreter(Target):
    name = "aten-only"

    def lower(self, program):
        plain = program.copy()
        decompose(plain, added_masks=True)
        assert not any("thresher" in str(n.target) for n in plain.nodes())
        kept = [program.input_names.index(n) for n in plain.input_names]
        module, names = lift_weights(plain)

        def run(inputs, weights):
            with torch.no_grad():
                return list(module(*(inputs[i] for i in kept), *weights))

        return Lowered(self.name, names, run)


RUNTIMES = (
    Runtime(
        "aten-only",
        added_masks=True,
        forms={"hadamard": Form(lambda node, runtime: (NATIVE, "") if runtime.added_masks else None, print)},
        refuses=lambda node: "It sums nothing up." if "cumsum" in str(node.target) else None,
        lower=lambda options, mode: Interpreter(),
    ),
)
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The target above, added as anyone would."""
    folder = tmp_path / "aten_only"
    folder.mkdir()
    (folder / "__init__.py").write_text(textwrap.dedent(FOLDER))
    monkeypatch.setattr(thresher.lowering, "__path__", [*thresher.lowering.__path__, str(tmp_path)])
    monkeypatch.setitem(catalog.TARGETS, "aten-only", "aten_only")
    yield
    sys.modules.pop("thresher.lowering.aten_only", None)


def test_a_target_in_a_folder_of_its_own_can_be_named_everywhere(added, tmp_path):
    model, inputs = zoo.ZOO["bert"].build()
    expected = model(**inputs)
    packed_calls = ops.get("varlen_attention").calls.total()
    compiled = thresher.compile(model, inputs, "exact", target="aten-only", verify=False)
    actual = compiled(**inputs)
    assert compiled.report.rewritten
    masks.assert_equal_at_real_tokens(actual, expected, inputs["attention_mask"], atol=1e-4)
    assert ops.get("varlen_attention").calls.total() == packed_calls  # none of our operators ran

    program = compiled.sessions[0].program
    found = coverage(program, "aten-only")
    packed = [e for e in found.entries if "varlen" in e.operator]
    assert packed and {e.how for e in packed} == {"decomposed"}
    assert all("memory grows" in e.reason for e in packed)

    path = thresher.save(compiled, tmp_path / "m.thresher", example_inputs=inputs)
    loaded = thresher.load(path, "aten-only")
    masks.assert_equal_at_real_tokens(loaded(**inputs), expected, inputs["attention_mask"], atol=1e-4)


def test_its_own_forms_and_refusals_are_said(added):
    import small_programs

    def function(x):
        return torch.cumsum(torch.ops.thresher.hadamard(x, None, 8), 0)

    program = small_programs.program(function, {"x": torch.randn(3, 8)})
    entries = coverage(program, "aten-only").entries
    assert [(e.how, e.reason) for e in entries] == [("native", ""), ("refused", "It sums nothing up.")]
    assert not coverage(program, "onnx-ort").refused


def test_targets_that_only_write_files_do_not_lower():
    assert catalog.lowering() == ("reference", "inductor", "tensorrt")
    for name in ("onnx-ort", "aoti", "reference "):
        with pytest.raises(ArgumentError, match="one of inductor, reference, tensorrt"):
            catalog.runtime(name, lowers=True)
    for name in catalog.TARGETS:
        assert catalog.runtime(name).name == name


def test_no_code_compares_a_target_with_a_name():
    """An ability is asked for in its place: a new target would be missed by such a comparison, without a word."""
    root = Path(thresher.lowering.__path__[0])
    words = {*catalog.TARGETS, *(name.removeprefix("onnx-") for name in catalog.TARGETS)}
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and not {"flavor", "provider.name"} & {ast.unparse(node.left)}:
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                found += [f"{path.name}: {ast.unparse(node)}"] if texts & words else []
    assert not found
