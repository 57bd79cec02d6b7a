"""The operator beyond the generic provider test: activation modes, poisoned values, tails, bad input."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from thresher.errors import ArgumentError
from thresher.formats.nvfp4 import swizzle
from thresher.kernels import native
from thresher.kernels.nvfp4 import cpu as nvfp4_cpu
from thresher.kernels.nvfp4 import cuda as nvfp4_cuda
from thresher.kernels.nvfp4.linear import ACTIVATIONS, nvfp4_linear
from thresher.kernels.nvfp4.quantize import MODES, NVFP4Weight, quantize

built = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def weight(n=24, k=200, seed=0):
    return quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))


def call(x, q, activations="exact", input_scale=None, bias=None):
    return nvfp4_linear(x, q.codes, q.block_scales, q.global_scale, input_scale, bias, activations)


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    "activations, bound", [("exact", 2e-6), ("int16", 3e-5), ("int8", 8e-3), ("nvfp4", 0.13)]
)
def test_error_of_the_activation_modes(activations, bound, rows):
    q = weight(64, 1024)
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(1))
    error = relative(call(x, q, activations), x.double() @ q.dequantize(torch.float64).t())
    assert error <= bound
    assert activations == "exact" or error > bound / 30  # the mode was applied, not ignored


def test_padding_does_not_reach_the_result():
    q = weight(8, 21)
    tail = NVFP4Weight(q.codes.clone(), q.block_scales, q.global_scale, 21)
    tail.codes[:, 11:] = 0x77  # stale bytes beyond K meet zero activations
    x = torch.randn(3, 21)
    for activations in ACTIVATIONS:
        torch.testing.assert_close(call(x, q, activations), call(x, tail, activations), rtol=0, atol=0)


@built
@pytest.mark.parametrize("activations", ["exact", "int8", "int16"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_activations_spoil_their_row_alone(activations, poison):
    q, x = weight(), torch.randn(6, 200)
    x[4, 77] = poison
    y = call(x, q, activations)
    assert nvfp4_linear.choose(x, q.codes, q.block_scales, q.global_scale)[0].name == "cpu_cpp"
    assert not y[4].isfinite().all() and y[[0, 1, 2, 3, 5]].isfinite().all()
    reference = nvfp4_linear.reference(x, q.codes, q.block_scales, q.global_scale, None, None, activations)
    assert torch.equal(y.isnan(), reference.isnan())


@built
@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("activations", ["exact", "int8", "int16", "nvfp4"])
def test_scale_bytes_outside_the_fast_range(activations, rows):
    q = weight()
    raw = q.block_scales.view(torch.uint8)
    raw[3, 2], raw[5, 12], raw[7, 0], raw[9, 1] = 0x7F, 0xFF, 0x80, 0x01  # NaN, NaN, -0, the least subnormal
    x = torch.randn(rows, 200)
    y = call(x, q, activations)
    assert y[:, [3, 5]].isnan().all()
    keep = [i for i in range(24) if i not in (3, 5)]
    reference = nvfp4_linear.reference(x, q.codes, q.block_scales, q.global_scale, None, None, activations)
    bound = 1e-2 if activations == "int8" else 1e-4  # rows with a signed scale keep exact activations
    assert relative(y[:, keep], reference[:, keep]) < bound


@built
@pytest.mark.parametrize("n, k", [(1, 1), (3, 16), (5, 128), (2, 129), (9, 1000)])
def test_tails_in_every_path(n, k):
    q = weight(n, k)
    for rows in (1, 2, 3, 4, 7, 17):
        x = torch.randn(rows, k)
        for activations in ("exact", "int8", "int16"):
            arguments = (x, q.codes, q.block_scales, q.global_scale, None, None, activations)
            assert relative(nvfp4_linear(*arguments), nvfp4_linear.reference(*arguments)) < 2e-6


@built
@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_bf16_activations_with_and_without_bf16_hardware(monkeypatch, hardware, rows):
    if not hardware:
        monkeypatch.setattr(nvfp4_cpu, "bf16_kernel", lambda: False)
    q, x = weight(40, 256), torch.randn(rows, 256).bfloat16()
    assert relative(call(x, q), x.double() @ q.dequantize(torch.float64).t()) < 4e-3


@built
def test_slabs_cover_all_rows(monkeypatch):
    q, x = weight(40, 64), torch.randn(20, 64)
    whole = call(x, q)
    monkeypatch.setattr(nvfp4_cpu, "_SLAB_BYTES", 64 * 4 * 7)
    assert relative(call(x, q), whole) < 1e-6


def test_static_input_scale_saturates():
    q = quantize(torch.eye(16))
    x = torch.full((1, 16), 100.0)
    y = call(x, q, "nvfp4", input_scale=torch.tensor(6.0 / 2688))
    assert y.max() == pytest.approx(6.0, rel=0.1)


@built
def test_choice_of_provider_says_why():
    q, x = weight(), torch.randn(2, 200)
    chosen, passed = nvfp4_linear.choose(x, q.codes, q.block_scales, q.global_scale)
    assert chosen.name == "cpu_cpp" and not passed
    strided = q.codes.t().contiguous().t()
    chosen, passed = nvfp4_linear.choose(x, strided, q.block_scales, q.global_scale)
    assert chosen.name == "reference" and "contiguous" in passed[0][1]


def test_compiles_into_one_node():
    q = weight(16, 64)
    program = torch.export.export(_Layer(q), (torch.randn(3, 64),))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls == [torch.ops.thresher.nvfp4_linear.default]
    x = torch.randn(3, 64)
    torch.testing.assert_close(program.module()(x), call(x, q))


class _Layer(torch.nn.Module):
    def __init__(self, q):
        super().__init__()
        for name in ("codes", "block_scales", "global_scale"):
            self.register_buffer(name, getattr(q, name))

    def forward(self, x):
        return torch.ops.thresher.nvfp4_linear(x, self.codes, self.block_scales, self.global_scale)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 48)}, "codes: got"),
        ({"x": torch.ones(2, 64, dtype=torch.int32)}, "x: got"),
        ({"codes": torch.zeros(16, 32, dtype=torch.int8)}, "codes: got"),
        ({"block_scales": torch.ones(512, dtype=torch.uint8)}, "unswizzle"),
        ({"block_scales": torch.ones(16, 4)}, "float8_e4m3fn"),
        ({"global_scale": torch.ones(2)}, "one float32 value"),
        ({"bias": torch.ones(3)}, "one value an output"),
        ({"input_scale": torch.ones(())}, 'activations="nvfp4"'),
        ({"activations": "int4"}, "one of exact"),
    ],
)
def test_bad_input(change, message):
    q = weight(16, 64)
    arguments = {"x": torch.ones(2, 64), "codes": q.codes, "block_scales": q.block_scales}
    arguments |= {"global_scale": q.global_scale, "input_scale": None, "bias": None, "activations": "exact"}
    arguments |= change
    with pytest.raises(ArgumentError, match="(?i)" + message):
        nvfp4_linear(*arguments.values())
    with pytest.raises(ArgumentError, match="(?i)" + message):
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            nvfp4_linear.fake(*arguments.values())


@built
@pytest.mark.slow
def test_portable_code_agrees_where_there_is_no_avx2(monkeypatch, tmp_path):
    plain = tuple(f for f in native._FLAGS if f != "-march=native")
    monkeypatch.setattr(native, "_FLAGS", plain)
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    x = torch.randn(5, 200)
    fast = {
        mode: quantize(torch.randn(24, 200, generator=torch.Generator().manual_seed(0)), mode=mode)
        for mode in MODES
    }
    native.load.cache_clear()
    nvfp4_cpu.bf16_kernel.cache_clear()
    try:
        for mode, q in fast.items():
            again = quantize(torch.randn(24, 200, generator=torch.Generator().manual_seed(0)), mode=mode)
            assert torch.equal(again.codes, q.codes)
            assert torch.equal(again.block_scales.view(torch.uint8), q.block_scales.view(torch.uint8))
        for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
            for activations in ("exact", "int8", "int16"):
                for rows in (x[:1], x, x.repeat(5, 1)):
                    arguments = (
                        rows.to(dtype),
                        q.codes,
                        q.block_scales,
                        q.global_scale,
                        None,
                        None,
                        activations,
                    )
                    with nvfp4_linear.force("cpu_cpp"):
                        y = nvfp4_linear(*arguments)
                    assert relative(y, nvfp4_linear.reference(*arguments)) < bound
    finally:
        native.load.cache_clear()
        nvfp4_cpu.bf16_kernel.cache_clear()


BF16_SHAPES = [
    (1, 33, 4096),
    (2, 8, 256),
    (5, 5, 200),
    (6, 7, 24),
    (10, 16, 16),
    (11, 31, 300),
    (12, 33, 1040),
]
BF16_SHAPES += [(13, 65, 272), (25, 1, 144), (40, 40, 8)]


@built
@pytest.mark.skipif(not nvfp4_cpu.bf16_kernel(), reason="This CPU has no AVX512-BF16 and VBMI.")
@pytest.mark.parametrize("m, n, k", BF16_SHAPES)
@pytest.mark.parametrize("few", [True, False])
def test_bf16_kernels_round_once(monkeypatch, m, n, k, few):
    monkeypatch.setattr(nvfp4_cpu, "FEW_BF16_ROWS", m if few else 0)
    generator = torch.Generator().manual_seed(m + n + k)
    q = quantize(torch.randn(n, k, generator=generator) * torch.logspace(0, -6, n)[:, None])
    x, bias = (torch.randn(s, generator=generator).bfloat16() for s in ((m, k), (n,)))
    expected = x.double() @ q.dequantize(torch.float64).t() + bias.double()
    y = call(x, q, bias=bias).double()
    spacing = torch.finfo(torch.bfloat16).eps * expected.abs()  # half of it, and fp32's error near a tie
    size = (x.double().abs() @ q.dequantize(torch.float64).abs().t()) + bias.double().abs()
    assert ((y - expected).abs() <= 0.5 * spacing + 2e-6 * size).all()
    raw = q.block_scales.view(torch.uint8)
    raw[0, 0] = 0x7F
    y = call(x, q)
    assert y[:, 0].isnan().all() and y[:, 1:].isfinite().all()


@built
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_bits(threads):
    q = weight(70, 528)
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 7, 20):
                x = torch.randn(rows, 528, generator=torch.Generator().manual_seed(2)).to(dtype)
                torch.set_num_threads(1)
                expected = call(x, q)
                torch.set_num_threads(threads)
                assert torch.equal(call(x, q), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("m, n, k", [(5, 32, 96), (130, 144, 64)])
def test_the_native_fp4_product_traces_without_a_gpu(m, n, k):
    """One `_scaled_mm_v2` on FP4 operands, 1x16 scales in the 32_4_4 swizzle, padded with zeros."""

    def operand(rows):
        codes = torch.empty(rows, k // 2, dtype=torch.uint8, device="cuda")
        scales = torch.empty(rows, k // 16, dtype=torch.float8_e4m3fn, device="cuda")
        return codes, scales, torch.empty((), device="cuda")

    def product(*tensors):
        a, (codes, scales, global_scale) = NVFP4Weight(*tensors[:3], k), tensors[3:]
        return nvfp4_cuda.scaled_mm(a, codes, swizzle(scales), global_scale, torch.bfloat16)

    with FakeTensorMode():
        graph = make_fx(product)(*operand(m), *operand(n)).graph
    (call_node,) = graph.find_nodes(op="call_function", target=torch.ops.aten._scaled_mm_v2.default)
    left, right, left_scales, recipe, layout, right_scales = call_node.args[:6]
    result = call_node.meta["val"]
    assert (tuple(result.shape), result.dtype, result.device.type) == ((m, n), torch.bfloat16, "cuda")
    assert left.meta["val"].dtype == right.meta["val"].dtype == torch.float4_e2m1fn_x2
    assert list(recipe) == [2, 0] and list(layout) == [1, 0]  # BlockWise1x16 and TensorWise; 32_4_4 and none
    for scales, rows in ((left_scales, m), (right_scales, n)):
        assert scales[0].meta["val"].numel() == -(-rows // 128) * -(-k // 64) * 512
    pads = graph.find_nodes(op="call_function", target=torch.ops.aten.constant_pad_nd.default)
    assert len(pads) == 2 and all(p.args[2] == 0 for p in pads)
