"""Our operators and quantized products in ONNX files give what the Program gives, at sizes other than those captured."""

import functools

import onnx
import pytest
import small_programs
import torch
from exported import ANY, GENERATOR, close, ort, random, reference

from thresher import ops
from thresher.errors import ThresherError
from thresher.formats import bitpack
from thresher.kernels.nvfp4 import quantize as nvfp4_quantize
from thresher.lowering.onnx import export as lowering


def test_token_operators(tmp_path):
    o = torch.ops.thresher

    def prune(q, k, v, scores, image, starts, lengths, x, fx, types):
        probes = o.probe_positions(starts, lengths, 3, 2, 0)
        asked = o.instruction_positions(types, starts, lengths, 4)
        rows = q.gather(2, probes.clamp_min(0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        sums, seen = o.probe_scores(rows, k, probes, None, 0.25)
        magnitude, cosine = o.token_transition(x, fx)
        moved = o.transition_score(magnitude, cosine, image, "paper")
        both = o.transprune_score(moved, sums, image, "official_code")
        count = o.adaptive_count(sums, None, 0.9)
        kept = o.topk_sorted(scores, image, None, 6, None)
        index = o.topk_sorted(sums, None, None, 6, count)
        ends, part = o.topk_segments(
            scores[0], image[0], starts.new_tensor([0, 4, 9]).int(), starts.new_tensor([2, 3]), 7
        )
        out = o.important_attention(q, k, v, index, 0.25)
        return probes, asked, sums, seen, magnitude, cosine, moved, both, count, kept, index, ends, part, out

    def given(batch, tokens):
        return {
            "q": random(batch, 4, tokens, 16),
            "k": random(batch, 2, tokens, 16),
            "v": random(batch, 2, tokens, 16),
            "scores": random(batch, tokens).mul(2).round(),  # with ties
            "image": torch.rand(batch, tokens, generator=GENERATOR) < 0.4,
            "starts": torch.zeros(batch, 1, dtype=torch.int64),
            "lengths": torch.full((batch, 1), tokens),
            "x": random(batch, tokens, 8),
            "fx": random(batch, tokens, 8),
            "types": (torch.rand(batch, tokens, generator=GENERATOR) < 0.4).to(torch.int8),
        }

    first = given(2, 9)
    token_dim = {"q": 2, "k": 2, "v": 2}
    dynamic = {
        n: {0: ANY} | ({token_dim.get(n, 1): ANY} if n not in ("starts", "lengths") else {}) for n in first
    }
    dynamic = {
        n: {d: a for d, a in dims.items() if d == 0} for n, dims in dynamic.items()
    }  # tokens fixed at 9
    program = small_programs.program(prune, first, dynamic=dynamic)
    record = lowering.export(program, tmp_path / "m.onnx")
    assert record.nodes["TopK"] >= 4
    for inputs in (first, given(3, 9), given(5, 9)):
        close(ort(record.path, inputs), program.run(*inputs.values()))


def test_kv_operators(tmp_path):
    o = torch.ops.thresher

    def step(q, k, v, tail_k, tail_v):
        pool = o.kv_quantize(k, v, 4, 8)
        ends = torch.tensor([8, 16, 20], dtype=torch.int32)
        return (*pool, o.kv_attention(q, [*pool, ends], tail_k, tail_v, None, 0.25))

    inputs = {"q": random(2, 4, 2, 16), "k": random(2, 2, 20, 16), "v": random(2, 2, 20, 16),
              "tail_k": random(2, 2, 5, 16), "tail_v": random(2, 2, 5, 16)}  # fmt: skip
    program = small_programs.program(step, inputs, dynamic={n: {0: ANY} for n in inputs})
    record = lowering.export(program, tmp_path / "m.onnx")
    close(ort(record.path, inputs), program.run(*inputs.values()))


def test_sparse_mlps_compute_densely_and_say_so(tmp_path):
    o = torch.ops.thresher

    def mlp(x, gate, up, down, scale):
        g = torch.nn.functional.linear(x, gate).relu()
        y = o.sparse_mlp(g, x, up, None, None, "relu", down, None, None, None, -1.0, 16, "")
        return y, o.sparse_down(g, (down * 50).round().to(torch.int8), scale, None, scale[0], 0.5, 16, "")

    weights = {
        "gate": random(24, 8),
        "up": random(24, 8),
        "down": random(24, 8),
        "scale": torch.rand(24) / 50,
    }
    program = small_programs.program(mlp, {"x": random(2, 3, 8)}, weights, {"x": {0: ANY, 1: ANY}})
    record = lowering.export(program, tmp_path / "m.onnx")
    assert sum("computes densely" in note for note in record.notes) == 2
    for sizes in ((2, 3), (4, 1), (1, 9)):
        x = random(*sizes, 8)
        close(ort(record.path, {"x": x}), program.run(x))


@functools.cache
def integers():
    """Every width, group and zero point in one program, behind a Hadamard transform."""
    o, weights, calls = torch.ops.thresher, {}, []
    cases = [(bits, group, zeros) for bits in (2, 3, 4, 8) for group in (32, -1) for zeros in (False, True)]
    for number, (bits, group, zeros) in enumerate(cases):
        groups = 64 // group if group > 0 else 1
        codes = torch.randint(0, 1 << bits, (20, 64), generator=GENERATOR)
        weights[f"codes{number}"] = bitpack.pack(codes, bits)
        weights[f"scales{number}"] = torch.rand(20, groups, generator=GENERATOR) / (1 << bits)
        weights[f"zeros{number}"] = torch.randint(
            0, 1 << bits, (20, groups), generator=GENERATOR, dtype=torch.uint8
        )
        weights[f"bias{number}"] = random(20)
        calls.append((bits, group, zeros))

    def linears(x, *held):
        x = o.hadamard(x, None, 64)
        results = []
        for number, (bits, group, zeros) in enumerate(calls):
            codes, scales, zero, bias = held[4 * number : 4 * number + 4]
            results.append(o.wna16_linear(x, codes, scales, zero if zeros else None, bias, bits, group))
        return tuple(results)

    return small_programs.program(linears, {"x": random(3, 64)}, weights, {"x": {0: ANY}})


@pytest.mark.parametrize(
    "runtime, level, limit, form",
    [
        ("portable", 0, 1e-5, "DequantizeLinear"),
        ("ort", 0, 1e-5, "com.microsoft::MatMulNBits"),
        ("ort", 4, 0.02, "com.microsoft::MatMulNBits"),
    ],
)
def test_integer_weights(runtime, level, limit, form, tmp_path):
    program = integers()
    record = lowering.export(program, tmp_path / "m.onnx", runtime=runtime, accuracy_level=level)
    assert record.nodes[form] == {"portable": 16, "ort": 16 if level == 4 else 8}[runtime]
    for rows in (3, 1, 17):
        x = random(rows, 64)
        close(ort(record.path, {"x": x}), program.run(x), limit)
    stored = {t.data_type for t in onnx.load(record.path).graph.initializer}
    assert onnx.TensorProto.INT4 in stored or level == 4


@functools.cache
def four_bit_floats(dynamic_scale=True):
    o, weights = torch.ops.thresher, {}
    cases = ["exact", "int8", "int16", "nvfp4"] if dynamic_scale else ["nvfp4", "exact"]
    for number in range(len(cases)):
        q = nvfp4_quantize.quantize(random(24, 64) * 0.05)
        weights[f"codes{number}"], weights[f"scales{number}"] = q.codes, q.block_scales.view(torch.uint8)
        weights[f"scale{number}"], weights[f"bias{number}"] = q.global_scale, random(24)
    weights["input_scale"] = torch.tensor(4.0 / 2688)

    def linears(x, *held):
        given = None if dynamic_scale else held[-1]
        results = []
        for number, activations in enumerate(cases):
            c, s, g, b = held[4 * number : 4 * number + 4]
            results.append(
                o.nvfp4_linear(x, c, s, g, given if activations == "nvfp4" else None, b, activations)
            )
        return tuple(results)

    return small_programs.program(linears, {"x": random(3, 64)}, weights, {"x": {0: ANY}})


def test_nvfp4_in_onnx_runtime(tmp_path):
    program = four_bit_floats()
    record = lowering.export(program, tmp_path / "m.onnx", runtime="ort")
    assert any("8.5 bits" in note for note in record.notes)
    for rows in (3, 1, 17):
        x = random(rows, 64)
        close(ort(record.path, {"x": x}), program.run(x))


@pytest.mark.parametrize("runtime", ["portable", "tensorrt"])
def test_nvfp4_in_standard_operators(runtime, tmp_path):
    program = four_bit_floats(runtime == "portable")
    record = lowering.export(program, tmp_path / "m.onnx", runtime=runtime)
    model = onnx.load(record.path)
    stored = {t.data_type for t in model.graph.initializer}
    assert {onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E4M3FN} <= stored
    for rows in (3, 1, 17):
        x = random(rows, 64)
        # the engine's own quantization rounds x / (scale * g) where ours multiplies by a reciprocal: ties may differ
        close(reference(record.path, {"x": x}), program.run(x), 1e-5 if runtime == "portable" else 2e-2)
    if runtime == "tensorrt":
        assert record.nodes["trt::TRT_FP4DynamicQuantize"] == 1
        assert [f.name for f in model.functions] == ["TRT_FP4DynamicQuantize"]


def test_tensorrt_needs_a_fixed_activation_scale(tmp_path):
    with pytest.raises(ThresherError, match="Calibrate"):
        lowering.export(four_bit_floats(), tmp_path / "m.onnx", runtime="tensorrt")


@pytest.mark.parametrize("name", ["expert_linear", "nvfp4_expert_linear", "wna16_expert_linear"])
def test_experts_in_onnx_runtime(name, tmp_path):
    op = next(o for o in ops.all_ops() if o.name == name)
    sample = next(s for s in op.inputs(torch.device("cpu"), torch.float32) if s.args[0].numel())
    tensors = {f"a{i}": a for i, a in enumerate(sample.args) if isinstance(a, torch.Tensor)}
    inputs = {n: t for n, t in tensors.items() if n == "a0" or t.dtype == torch.int64}
    held = {n: t for n, t in tensors.items() if n not in inputs}

    def product(*given):
        found = dict(zip([*inputs, *held], given, strict=True))
        return (op.overload(*(found.get(f"a{i}", a) for i, a in enumerate(sample.args))),)

    program = small_programs.program(product, inputs, held)
    record = lowering.export(program, tmp_path / "m.onnx")
    close(ort(record.path, inputs), program.run(*inputs.values()))


def test_every_operator_of_a_program_is_exported_by_some_test_here():
    tested = {"probe_positions", "instruction_positions", "probe_scores", "token_transition", "transition_score",
              "transprune_score", "adaptive_count", "topk_sorted", "topk_segments", "important_attention", "kv_quantize",
              "kv_attention", "sparse_mlp", "sparse_down", "wna16_linear", "hadamard", "nvfp4_linear", "varlen_attention",
              "varlen_attention_masked", "expert_linear", "nvfp4_expert_linear", "wna16_expert_linear"}  # fmt: skip
    # The first packs weights before a graph exists, the second is for Inductor's programs alone, and programs with the
    # third are refused (tests/passes/zipvl/test_exact.py).
    assert {o.name for o in ops.all_ops()} - tested == {
        "nvfp4_quantize",
        "few_linear",
        "half_linear",
        "tokens_holding",
    }


def test_attention_under_the_batchs_own_mask(tmp_path):
    op = ops.get("varlen_attention_masked")
    names = ("q", "k", "v", "mask", "rows", "cols", "cu_seqlens")
    for number, sample in enumerate(op.inputs(torch.device("cpu"), torch.float32)):
        if number not in (0, 2, 4):  # a bias; a prefix with filler; a query that sees nothing
            continue
        *tensors, longest, scale = sample.args

        def attend(*args, longest=longest, scale=scale):
            return torch.ops.thresher.varlen_attention_masked(*args, longest, scale)

        inputs = dict(zip(names, tensors))
        program = small_programs.program(attend, inputs)
        record = lowering.export(program, tmp_path / f"{number}.onnx")
        close(ort(record.path, inputs), program.run(*tensors))


def test_causal_attention_of_a_prompt_is_onnx_runtimes_own_operator(tmp_path):
    """Keys are not repeated for the queries that share them; a mask keeps the standard form."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def layer(x, mask):
        batch, tokens, _ = x.shape
        q, k, v = (t.unflatten(2, (-1, 16)).transpose(1, 2) for t in x.split((64, 32, 32), 2))
        wide = [t[:, :, None].expand(batch, 2, 2, tokens, 16).reshape(batch, 4, tokens, 16) for t in (k, v)]
        own = attend(q, k, v, is_causal=True, enable_gqa=True)
        return own, attend(q, *wide, is_causal=True, scale=0.3), attend(q, *wide, mask)

    def given(batch, tokens):
        mask = torch.rand(batch, 1, tokens, tokens, generator=GENERATOR) < 0.5
        return {"x": random(batch, tokens, 128), "mask": mask | torch.eye(tokens, dtype=torch.bool)}

    moving = {"x": {0: ANY, 1: ANY}, "mask": {0: ANY, 2: ANY, 3: ANY}}
    program = small_programs.program(layer, given(2, 9), {}, moving)
    record = lowering.export(program, tmp_path / "m.onnx", runtime="ort")
    assert record.nodes["com.microsoft::GroupQueryAttention"] == 2 and record.nodes["Attention"] == 1
    for sizes in ((2, 9), (1, 5), (3, 17)):
        inputs = given(*sizes)
        close(ort(record.path, inputs), program.run(*inputs.values()), 1e-5)
    nodes = lowering.export(program, tmp_path / "g.onnx", runtime="ort-cuda").nodes
    assert "com.microsoft::GroupQueryAttention" not in nodes, "on a GPU it takes half types only"
