"""ONNX models give what the Program gives, at sizes other than those captured."""

import functools
import io

import captures
import masks
import onnx
import pytest
import small_programs
import torch
import zoo
from exported import ANY, GENERATOR, close, ort, random
from rich.console import Console

import thresher
from thresher import backend
from thresher.errors import ArgumentError, ThresherError
from thresher.graph.call_plan import CallPlan, Choice, refuse_to_keep
from thresher.lowering.onnx import export as lowering
from thresher.lowering.onnx import write as onnx_write
from thresher.lowering.onnx.stages import Stages
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime.compare import run_plainly

# -- whole models, packed and not ---------------------------------------------------------------------


@functools.cache
def packed(name):
    program = captures.of_zoo(name, "export-dynamic")
    _, inputs = zoo.ZOO[name].build()
    rewritten, _ = backend.run_pipeline(program, Recipe.of("exact"), captures.arguments(program, inputs))
    assert rewritten.packing is not None
    return rewritten


BATCHES = [
    masks.right(zoo.LENGTHS),
    masks.left((4, 10)),
    torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 1]] * 3),
]


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        pytest.param("mistral", marks=pytest.mark.thorough),
        pytest.param("bert", marks=pytest.mark.thorough),
    ],
)
def test_a_packed_model_takes_and_gives_padded_tensors(name, tmp_path):
    program = packed(name)
    record = lowering.export(program, tmp_path / "m.onnx")
    kept = name == "mistral"  # its sliding windows count padded columns, and keep a mask
    assert record.nodes["NonZero"] == 1
    assert record.nodes["Attention" if kept else "thresher::PackedAttention"] == 2
    layout = program.packing
    for mask in BATCHES:
        inputs = {k: v for k, v in zoo.tokens(mask).items() if k in layout.padded.input_names}
        values = [inputs[n] for n in layout.padded.input_names]
        expected, real = run_plainly(layout.padded, values, Reference()), mask.bool()
        actual = ort(record.path, inputs)
        for a, e in zip(actual, expected, strict=True):
            a = torch.from_numpy(a)
            a, e = (
                t[real] if t.dim() > 2 else t[real[:, 0]] for t in (a, e)
            )  # a pooler reads the first token
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert {i.name for i in onnx.load(record.path).graph.input} == set(layout.padded.input_names)


def test_a_body_takes_packed_tensors(tmp_path):
    program = packed("llama")
    for runtime in ("ort", "tensorrt"):
        record = lowering.export(program, tmp_path / f"{runtime}.onnx", runtime=runtime, body_only=True)
        assert "NonZero" not in record.nodes and "max_len" not in record.inputs
        for lengths in ((5, 8, 12), (1, 30), (7,)):
            given = body_inputs(program, lengths)
            expected = program.run(*(given[n] for n in program.input_names))
            tensors = {n: given[n] for n in record.inputs}
            close(ort(record.path, tensors), expected)
    additive = next(n for n in onnx.load(record.path).graph.node if n.op_type == "Attention").input[3]
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in onnx.shape_inference.infer_shapes(onnx.load(record.path)).graph.value_info
    }
    assert types[additive] == onnx.TensorProto.FLOAT  # TensorRT fuses an additive mask, and no bool one


def body_inputs(program, lengths):
    tokens = sum(lengths)
    found = {}
    for place, name in zip(program.placeholders, program.input_names):
        known = place.meta["val"]
        if name == "cu_seqlens":
            found[name] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        elif name == "max_len":
            found[name] = max(lengths)
        elif known.dtype == torch.int64:
            found[name] = torch.randint(3, 90, (1, tokens))
        else:
            found[name] = random(*(s if isinstance(s, int) else tokens for s in known.shape))
    return found


def test_tensorrt_cannot_pack_in_the_graph(tmp_path):
    with pytest.raises(ArgumentError, match="NonZero"):
        lowering.export(packed("llama"), tmp_path / "m.onnx", runtime="tensorrt")
    with pytest.raises(ArgumentError, match="portable"):
        lowering.export(packed("llama"), tmp_path / "m.onnx", runtime="ONNX")


# -- operators ----------------------------------------------------------------------------------------


# -- quantized linears --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_rewritten_exported_run_and_compared(tmp_path):
    model, inputs = zoo.ZOO["llama"].build()
    record = thresher.export_onnx(model, inputs, tmp_path / "m.onnx", "exact")
    assert len(record.differences) == 3 and record.worst < 1e-5
    assert len({str(d["sizes"]) for d in record.differences}) == 3
    assert record.outputs == ["logits"] and "NonZero" in record.nodes
    assert model.config.use_cache
    with pytest.raises(ThresherError, match="cannot capture"):
        thresher.export_onnx(_Unexportable().eval(), (torch.ones(3),), tmp_path / "m.onnx")


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    """Both files are written, checked and run; a smaller model over it leaves no old data behind."""
    monkeypatch.setattr(onnx_write, "_LARGE", 1 << 12)
    weights = {"w": random(64, 64)}
    program = small_programs.program(
        torch.nn.functional.linear, {"x": random(3, 64)}, weights, {"x": {0: ANY}}
    )
    stages = []
    record = lowering.export(program, tmp_path / "m.onnx", stage=stages.append)
    assert stages == ["translating the body", "folding constants", "writing 0 MB", "checking the file"]
    data = tmp_path / "m.onnx.data"
    assert data.stat().st_size >= 64 * 64 * 4 and record.bytes > data.stat().st_size
    x = random(5, 64)
    close(ort(record.path, {"x": x}), program.run(x))
    monkeypatch.setattr(onnx_write, "_LARGE", 1 << 28)
    lowering.export(program, tmp_path / "m.onnx")
    assert not data.exists()


@pytest.mark.parametrize("large", [1 << 12, 1 << 28])
def test_an_export_that_stops_leaves_the_old_files_whole(tmp_path, monkeypatch, large):
    monkeypatch.setattr(onnx_write, "_LARGE", large)
    weights = {"w": random(64, 64)}
    program = small_programs.program(
        torch.nn.functional.linear, {"x": random(3, 64)}, weights, {"x": {0: ANY}}
    )
    lowering.export(program, tmp_path / "m.onnx")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(before) == (2 if large == 1 << 12 else 1)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    other = small_programs.program(
        torch.nn.functional.linear, {"x": random(3, 64)}, {"w": random(64, 64)}, {"x": {0: ANY}}
    )
    monkeypatch.setattr("onnx.checker.check_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowering.export(other, tmp_path / "m.onnx")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_record_prints_its_differences_and_notes(tmp_path):
    found = dict(engine="onnxruntime", sizes={"x": [2, 8]}, absolute=1e-6, relative=2e-6)
    record = onnx_write.Exported(
        "m.onnx", "ort", 23, ["x"], ["y"], 2 << 20, 1.0, {"Add": 3}, ["A note."], [found]
    )
    text = str(record)
    assert "3 nodes; x -> y" in text and "onnxruntime at x 2x8: 1.0e-06 from the program" in text
    assert text.endswith("A note.") and "not run" not in text
    record.differences = []
    assert "checked, and not run" in str(record)


def test_a_terminal_sees_the_stage_and_a_file_nothing():
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        with Stages(console) as stage:
            stage("capturing")
            stage("writing")
        shown = console.file.getvalue()
        assert ("exporting: writing" in shown) == terminal and bool(shown) == terminal


@pytest.mark.slow
def test_rsqs_own_codes_and_token_pruning_in_one_file(tmp_path):
    """The passes' output and no stand-in: MatMulNBits of the codes that RSQ found, TopK for the tokens kept."""
    model, inputs = zoo.ZOO["llama"].build()
    plain = thresher.RSQ(bits=4, group_size=32, rotate=False, rotate_heads=False, rotate_down=False)
    low = thresher.quantize(model, torch.randint(3, 90, (4, 16), generator=GENERATOR), plain)
    low.save(tmp_path / "low.safetensors")
    prune = dict(policy="uniform", stages=((1, 0.5),), image_span=(2, 8), min_image_tokens=2, bucket=1)
    recipe = dict(low.options, transprune=dict(prune, min_saving=-9.0, choice=(3,)))
    record = thresher.export_onnx(model, inputs, tmp_path / "m.onnx", **recipe)
    assert record.worst < 1e-5 and len(record.differences) == 3
    assert record.outputs == ["logits", "kept.1"] and any(
        "the choice (3,), made for the example" in n for n in record.notes
    )
    assert record.nodes["com.microsoft::MatMulNBits"] == 12 and record.nodes["TopK"] >= 1


def test_what_was_settled_for_one_call_is_not_exported_unasked():
    program = small_programs.program(lambda x: (x + 1,), {"x": random(3)}, {}, {})
    program.calls = CallPlan({"transprune": Choice((3,), None, lambda values, inputs: (3,))})
    refuse_to_keep(program, "recipe", ["transprune"])
    with pytest.raises(ArgumentError, match=r"say so: transprune=\{'choice': \(3,\)\}"):
        refuse_to_keep(program, "recipe")


class _Unexportable(torch.nn.Module):
    def forward(self, x):
        return x.numpy().tolist()
