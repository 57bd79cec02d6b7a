"""Packed attention as ONNX Runtime's own operators gives what the operator of ours gives."""

import numpy as np
import onnx
import pytest
import small_programs
import torch

from thresher import ops
from thresher.lowering.coverage import coverage
from thresher.lowering.onnx import attention as onnx_attention
from thresher.lowering.onnx import check as onnx_check
from thresher.lowering.onnx import export as lowering

ANY = torch.export.Dim.DYNAMIC


def samples(*labels):
    found = {s.label: s.args for s in ops.get("varlen_attention").inputs(torch.device("cpu"), torch.float32)}
    return [found[label] for label in labels] if labels else list(found.values())


def program(cases, moving=False):
    """One program that attends over each case; with moving, tokens and sequences vary together in all."""
    inputs = {f"{name}{i}": t for i, case in enumerate(cases) for name, t in zip("qkvc", case)}
    rest = [case[4:] for case in cases]

    def attend(*tensors):
        return tuple(
            torch.ops.thresher.varlen_attention(*tensors[4 * i : 4 * i + 4], *options)
            for i, options in enumerate(rest)
        )

    dynamic = {name: {0: ANY} if name[0] == "c" else {2: ANY} for name in inputs} if moving else None
    return small_programs.program(attend, inputs, dynamic=dynamic), inputs


def worst(record, made, inputs):
    engine, run = onnx_check.runner(record.path)
    expected = made.run(*inputs.values())
    gaps = [onnx_check.difference(torch.from_numpy(a), e, None)[1] for a, e in zip(run(inputs), expected)]
    return engine, max(gaps)


def test_every_case_of_the_operator(tmp_path):
    """Empty sequences, shared keys and caps on scores; head widths that the runtime's operator lacks keep a mask."""
    made, inputs = program([c for c in samples() if c[0].shape[2] and c[7] < 0])
    record = lowering.export(made, tmp_path / "m.onnx", runtime="ort")
    assert record.nodes["thresher::PackedAttention"] == 5 and any("1.31" in n for n in record.notes)
    assert worst(record, made, inputs) == ("onnxruntime", pytest.approx(0, abs=1e-5))


def test_what_keeps_a_mask_is_said_beforehand():
    made, _ = program(samples())
    kept = [e.reason for e in coverage(made, "onnx-ort").entries if "square" in e.reason]
    counts = [sum(word in r for r in kept) for word in ("window", "multiple of 8", "sinks")]
    assert counts == [4, 2, 4] and len(kept) == 10


def test_other_sizes_than_those_captured(tmp_path):
    made, _ = program(samples("grouped heads, empty segments"), moving=True)
    record = lowering.export(made, tmp_path / "m.onnx", runtime="ort")
    make = torch.Generator().manual_seed(0)
    for lengths in ((3,), (1, 1, 70), (0, 5, 0, 8)):
        q, k, v = (torch.randn(1, sum(lengths), h, 64, generator=make).transpose(1, 2) for h in (6, 2, 2))
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        assert worst(record, made, {"q0": q, "k0": k, "v0": v, "c0": offsets})[1] < 1e-5


def test_encoders_on_cuda_take_packed_tokens_as_they_are(tmp_path):
    """No CPU runs PackedMultiHeadAttention: its documented meaning stands for it, and the record says so."""
    made, inputs = program(samples("bidirectional"))
    record = lowering.export(made, tmp_path / "m.onnx", runtime="ort-cuda")
    assert record.nodes["thresher::PackedEncoderAttention"] == 1 and onnx_attention.UNRUN in record.notes
    engine, gap = worst(record, made, inputs)
    assert "PackedMultiHeadAttention as documented" in engine and gap < 1e-5
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]
    (entry,) = coverage(made, "onnx-ort-cuda").entries
    assert onnx_attention.UNRUN in entry.reason


def test_the_operator_is_told_where_each_token_was_in_a_batch_padded_on_the_right(tmp_path):
    """As documented: slots of all tokens in their order, then of all padding."""
    made, inputs = program(samples("bidirectional"))
    model = onnx.load(lowering.export(made, tmp_path / "m.onnx", runtime="ort-cuda").path)
    (function,) = model.functions
    (place,) = [i for i, n in enumerate(function.node) if n.op_type == "PackedMultiHeadAttention"]
    node = function.node[place]
    assert node.domain == "com.microsoft" and node.input[3] == "" and node.input[5] == "cu"
    assert {a.name: a.ref_attr_name for a in node.attribute} == {"num_heads": "num_heads", "scale": "scale"}
    spread = onnx.helper.make_node("Identity", [node.input[4]], ["offset"])
    del function.node[place:], function.output[:], function.input[:], function.attribute[:]
    function.node.append(spread)
    function.input.extend(["q", "k", "v", "cu"])
    function.output.append("offset")
    call = onnx.helper.make_node(function.name, ["q", "k", "v", "cu"], ["offset"], domain=function.domain)
    graph = onnx.helper.make_graph(
        [call],
        "g",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "qkv"]
        + [onnx.helper.make_tensor_value_info("cu", onnx.TensorProto.INT32, None)],
        [onnx.helper.make_tensor_value_info("offset", onnx.TensorProto.INT32, None)],
    )
    alone = onnx.helper.make_model(graph, functions=[function], opset_imports=model.opset_import)
    q, k, v, offsets = (t.numpy() for t in inputs.values())
    evaluator = onnx.reference.ReferenceEvaluator(alone)
    (offset,) = evaluator.run(None, {"q": q, "k": k, "v": v, "cu": offsets})
    lengths = np.diff(offsets)
    slots = np.arange(len(lengths) * lengths.max()).reshape(len(lengths), -1)
    real = np.arange(lengths.max()) < lengths[:, None]
    assert offset.dtype == np.int32 and offset.shape == slots.shape
    assert offset.reshape(-1).tolist() == [*slots[real], *slots[~real]]


def test_decoders_on_cuda_need_half_types(tmp_path):
    made, _ = program(samples("causal"))
    record = lowering.export(made, tmp_path / "m.onnx", runtime="ort-cuda")
    assert record.nodes["Attention"] == 1
    assert "half types" in coverage(made, "onnx-ort-cuda").entries[0].reason
    half = [tuple(t.half() if i < 3 else t for i, t in enumerate(c)) for c in samples("causal")]
    made, inputs = program(half)
    record = lowering.export(made, tmp_path / "h.onnx", runtime="ort-cuda")
    assert record.nodes["thresher::PackedAttention"] == 1 and worst(record, made, inputs)[1] < 2e-3


def test_an_older_runtime_keeps_the_mask(monkeypatch):
    made, _ = program(samples("bidirectional"))
    monkeypatch.setattr(onnx_attention, "_older_runtime", lambda: "1.23.2")
    assert "1.31 or newer, and 1.23.2 is installed" in coverage(made, "onnx-ort").entries[0].reason


def test_a_batch_without_tokens_is_an_error_and_no_crash(tmp_path):
    made, _ = program(samples("grouped heads, empty segments"), moving=True)
    _, run = onnx_check.runner(lowering.export(made, tmp_path / "m.onnx", runtime="ort").path)
    empty = {f"{n}0": torch.zeros(1, h, 0, 64) for n, h in zip("qkv", (6, 2, 2))}
    with pytest.raises(Exception, match="out of data bounds"):
        run({**empty, "c0": torch.zeros(2, dtype=torch.int32)})
