"""An exported file runs in ONNX Runtime on its own example, at one row too, or export raises."""

import onnx
import onnxruntime
import pytest
import torch

import thresher
from thresher.errors import ArgumentError, ThresherError
from thresher.lowering.onnx.check import compare
from thresher.testing import tiny_model


def ort(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items()})[0])


class Encoder(torch.nn.Module):
    """With torch's own encoder, whose padding mask has one row for all queries."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.table = torch.nn.Embedding(97, 32)
        self.encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, input_ids, attention_mask):
        return self.encoder(self.table(input_ids), src_key_padding_mask=attention_mask == 0)


def test_a_mask_of_one_row_for_all_queries(tmp_path):
    torch.manual_seed(0)
    model, (_, batch) = Encoder().eval(), tiny_model()
    path = tmp_path / "m.onnx"
    record = thresher.export_onnx(model, batch, path, "none")
    assert len(record.differences) == 3 and all(d["relative"] < 1e-5 for d in record.differences)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ort(path, batch)[real], model(**batch)[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", [pytest.param("none", marks=pytest.mark.thorough), "exact"])
def test_an_example_of_one_row_is_exported_for_any_number(tmp_path, recipe):
    model, batch = tiny_model()
    path = tmp_path / "m.onnx"
    one = {k: v[2:, :7] for k, v in batch.items()}
    one["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    thresher.export_onnx(model, one, path, recipe)
    for given in (one, batch):
        real = given["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(ort(path, given)[real], model(**given)[real], atol=1e-5, rtol=1e-4)
    sizes = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input]
    assert sizes == [["batch", "sequence"]] * 2


def test_arguments_that_are_no_tensors_are_constants_of_the_file(tmp_path):
    class Options(torch.nn.Module):
        def forward(self, x, flag=True, labels=None, times=1, how="same"):
            return x * times if flag and how == "same" else x - 1

    for flag, wanted in ((True, 2.0), (False, 0.0)):
        path = tmp_path / "m.onnx"
        given = {"flag": flag, "labels": None, "x": torch.ones(3, 4), "times": 2, "how": "same"}
        record = thresher.export_onnx(Options().eval(), given, path, "none")
        assert record.differences and [i.name for i in onnx.load(path).graph.input] == ["x"]
        assert (ort(path, {"x": torch.ones(5, 2)}) == wanted).all()


class MixedNorm(torch.nn.Module):
    """A norm whose scale is in fp32 behind a half input, as Gemma's."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight).type_as(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_norm_with_a_scale_of_another_type_is_fused(tmp_path, dtype):
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    record = thresher.export_onnx(
        MixedNorm().eval(), (torch.randn(3, 5, 32, dtype=dtype),), path, "none", runtime="portable"
    )
    assert all(d["relative"] < 0.01 for d in record.differences)
    assert "RMSNormalization" in {n.op_type for n in onnx.load(path).graph.node}


def test_options_are_checked_before_anything_is_captured(tmp_path):
    with pytest.raises(ArgumentError, match="runtime: got 'onnxruntime'"):
        thresher.export_onnx(
            torch.nn.Linear(2, 2).eval(), (object(),), tmp_path / "m.onnx", runtime="onnxruntime"
        )


def test_what_stays_fixed_is_said(tmp_path):
    class Double(torch.nn.Module):
        def forward(self, x):
            return x * 2

    record = thresher.export_onnx(Double().eval(), (torch.randn(3, 1),), tmp_path / "m.onnx", "none")
    assert any("x keeps dimension 1 at 1" in n for n in record.notes)


def test_training_mode_is_refused(tmp_path):
    model, batch = tiny_model()
    with pytest.raises(ArgumentError, match=r"Call model.eval\(\) first"):
        thresher.export_onnx(model.train(), batch, tmp_path / "m.onnx")


@pytest.mark.parametrize("recipe", ["none", "exact", "embed"])
def test_a_bf16_model_runs_in_fp32_from_weights_in_bf16(tmp_path, recipe):
    """ONNX Runtime has no bf16 product on a CPU; computing in fp32 is nearer to exact than the model itself."""
    model, batch = tiny_model()
    path, real = tmp_path / "m.onnx", batch["attention_mask"].bool()
    with torch.no_grad():
        half = model.bfloat16()(**batch)
        exact = model.double()(**batch)
    record = thresher.export_onnx(model.bfloat16(), batch, path, recipe)
    assert record.widened and record.worst < 1e-5 and any("computes in fp32" in n for n in record.notes)
    kinds = onnx.TensorProto.DataType
    graph = onnx.load(path).graph
    large = {i.data_type for i in graph.initializer if len(i.dims) == 2 and i.dims[0] * i.dims[1] >= 1024}
    assert large == {kinds.BFLOAT16}
    assert {o.type.tensor_type.elem_type for o in graph.output} == {kinds.FLOAT}
    ours, theirs = ((t.double() - exact)[real].abs().max() for t in (ort(path, batch), half))
    assert ours < theirs / 20


def test_what_computes_in_bf16_in_an_fp32_model_is_widened_too(tmp_path):
    model, batch = tiny_model()

    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.scale = model, torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids, attention_mask).to(torch.bfloat16)
            return torch.nn.functional.softmax(hidden * self.scale, -1, dtype=torch.float32)

    path = tmp_path / "m.onnx"
    assert thresher.export_onnx(Narrow().eval(), batch, path, "none").worst < 1e-5
    portable = thresher.export_onnx(model.bfloat16(), batch, tmp_path / "p.onnx", "none", runtime="portable")
    assert not portable.widened and all(d["relative"] < 0.05 for d in portable.differences)


def test_a_file_that_fails_on_its_first_call_raises_and_on_a_later_one_is_noted(tmp_path):
    node = onnx.helper.make_node("Add", ["x", "y"], ["z"])
    kinds = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [n]) for n in "xyz"]
    graph = onnx.helper.make_graph([node], "g", kinds[:2], kinds[2:])
    path = tmp_path / "m.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path
    )
    good = ({"x": torch.ones(3), "y": torch.ones(3)}, [torch.full((3,), 2.0)], None)
    bad = ({"x": torch.ones(3), "y": torch.ones(2)}, [torch.ones(3)], None)
    with pytest.raises(ThresherError, match="does not run on its own example"):
        compare(path, [bad])
    records, notes = compare(path, [good, bad])
    assert records[0]["absolute"] == 0.0 and "failed at sizes" in notes[0]
