"""The low-bit linear: what it computes, on the edges of its shapes, and which path computes it."""

import pytest
import torch

from thresher.errors import ArgumentError
from thresher.formats import bitpack
from thresher.kernels.wna16 import cpu as wna16_cpu
from thresher.kernels.wna16 import linear as defs

linear = defs.wna16_linear
CPU = next(p for p in linear.providers if p.name == "cpu_cpp")
needs_cpp = pytest.mark.skipif(linear.usable(CPU) is not None, reason=str(linear.usable(CPU)))


def weight(outputs, inputs, bits, group=-1, zeros=False, scale_dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    groups = 1 if group < 0 else inputs // group
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=make)
    scales = (torch.rand(outputs, groups, generator=make) + 0.5).to(scale_dtype)
    zero = torch.randint(0, 1 << bits, (outputs, groups), generator=make, dtype=torch.uint8)
    return codes, scales, zero if zeros else None


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_reference_is_the_textbook_formula():
    codes, scales, zeros = weight(5, 64, 3, 32, zeros=True)
    x, bias = torch.randn(4, 64, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    dense = torch.empty(5, 64, dtype=torch.float64)
    for n in range(5):
        for k in range(64):
            g = k // 32
            dense[n, k] = (int(codes[n, k]) - int(zeros[n, g])) * float(scales[n, g])
    actual = linear(x, bitpack.pack(codes, 3), scales, zeros, bias, 3, 32)
    torch.testing.assert_close(actual, x @ dense.t() + bias)


@pytest.mark.parametrize("bits", defs.BITS)
def test_symmetric_zero_point_is_the_middle_code(bits):
    codes, scales, _ = weight(6, 32, bits)
    middle = torch.full((6, 1), 1 << (bits - 1), dtype=torch.uint8)
    x = torch.randn(3, 32)
    packed = bitpack.pack(codes, bits)
    assert torch.equal(
        linear(x, packed, scales, None, None, bits, -1), linear(x, packed, scales, middle, None, bits, -1)
    )


@needs_cpp
@pytest.mark.parametrize("bits", defs.BITS)
@pytest.mark.parametrize("inputs", [1, 2, 5, 8, 9, 16, 31, 33, 64, 100])
def test_cpp_row_tails(bits, inputs):
    for outputs in (1, 3, 4, 5, 9):
        codes, scales, zeros = weight(outputs, inputs, bits, zeros=True, seed=inputs)
        x = torch.randn(2, inputs) + 0.5
        args = (x, bitpack.pack(codes, bits), scales, zeros, None, bits, -1)
        with linear.force("cpu_cpp"):
            actual = linear(*args)
        expected = x.double() @ defs.dequantize(*args[1:4], bits, inputs, torch.float64).t()
        # The two halves of the sum, codes and zero points, may cancel: measure against their size.
        bound = 1e-6 * float((x.abs().double() @ (codes.double() * scales.double()).t()).max())
        assert float((actual - expected).abs().max()) <= bound


@needs_cpp
@pytest.mark.parametrize("bits", defs.BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_cpp_groups_of_half_types(bits, group):
    """Integer kernels take only groups that fall on their vectors' lanes, and leave the others to one that takes all."""
    codes, scales, zeros = weight(5, 384, bits, group, zeros=True)
    x = torch.randn(3, 384).bfloat16()
    args = (x, bitpack.pack(codes, bits), scales, zeros, None, bits, group)
    with linear.force("cpu_cpp"):
        assert relative(linear(*args).float(), linear.reference(*args).float()) < 8e-3


@needs_cpp
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 40])
def test_cpp_row_counts(rows):
    codes, scales, zeros = weight(37, 192, 3, 64, zeros=True)
    x, bias = torch.randn(rows, 192), torch.randn(37)
    args = (x, bitpack.pack(codes, 3), scales, zeros, bias, 3, 64)
    with linear.force("cpu_cpp"):
        assert relative(linear(*args), linear.reference(*args)) < 3e-6


@needs_cpp
def test_cpp_gives_each_row_the_same_bits_whatever_stands_beside_it(monkeypatch):
    codes, scales, _ = weight(64, 128, 4, 32)
    x = torch.randn(8, 128)
    packed = bitpack.pack(codes, 4)
    together = linear(x, packed, scales, None, None, 4, 32)
    again = linear(torch.cat([x[:1], torch.full((7, 128), 1e6)]), packed, scales, None, None, 4, 32)
    assert torch.equal(together[0], again[0])


@needs_cpp
def test_cpp_many_rows_in_slabs(monkeypatch):
    monkeypatch.setattr(wna16_cpu, "_SLAB", 96 * 5)  # slabs of five weight rows, the last one short
    codes, scales, zeros = weight(33, 96, 2, 32, zeros=True)
    x, bias = torch.randn(20, 96), torch.randn(33)
    args = (x, bitpack.pack(codes, 2), scales, zeros, bias, 2, 32)
    with linear.force("cpu_cpp"):
        assert relative(linear(*args), linear.reference(*args)) < 3e-6


@needs_cpp
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpp_reads_scales_of_16_and_32_bits(scale_dtype):
    codes, scales, _ = weight(21, 128, 4, 64, scale_dtype=scale_dtype)
    for rows in (1, 24):
        args = (torch.randn(rows, 128), bitpack.pack(codes, 4), scales, None, None, 4, 64)
        with linear.force("cpu_cpp"):
            assert relative(linear(*args), linear.reference(*args)) < 3e-6


@needs_cpp
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_activations_keep_their_dtype_and_shape(dtype, bound):
    codes, scales, _ = weight(48, 64, 4, 32)
    packed = bitpack.pack(codes, 4)
    for lead in ((), (3,), (2, 1, 5), (4, 9), (0,)):
        x = torch.randn(*lead, 64).to(dtype)
        actual = linear(x, packed, scales, None, None, 4, 32)
        assert actual.dtype == dtype and actual.shape == (*lead, 48)
        if actual.numel():
            exact = linear.reference(x.double(), packed, scales, None, None, 4, 32)
            assert relative(actual, exact) < bound


@needs_cpp
def test_cpp_takes_activations_and_weights_of_any_stride():
    codes, scales, zeros = weight(12, 64, 4, 32, zeros=True)
    packed = bitpack.pack(codes, 4)
    x = torch.randn(64, 6).t()
    expected = linear.reference(x, packed, scales, zeros, None, 4, 32)
    strided = (packed.t().contiguous().t(), scales.t().contiguous().t(), zeros.t().contiguous().t())
    with linear.force("cpu_cpp"):
        assert relative(linear(x, *strided, None, 4, 32), expected) < 3e-6


@needs_cpp
def test_nonfinite_activations_stay_visible_in_their_own_row():
    codes, scales, _ = weight(16, 64, 4, 32)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    out = linear(x, bitpack.pack(codes, 4), scales, None, None, 4, 32)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@needs_cpp
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
def test_activations_as_integers_lose_nothing_to_outliers(bits, dtype, bound):
    """Where the CPU multiplies integers, steps come from a block's largest value; it must not overflow either."""
    codes, scales, zeros = weight(32, 576, bits, 64, zeros=True)
    x = torch.randn(7, 576, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 300
    args = (x.to(dtype), bitpack.pack(codes, bits), scales, zeros, None, bits, 64)
    exact = linear.reference(args[0].double(), *args[1:])
    with linear.force("cpu_cpp"):
        actual = linear(*args)
        beside = linear(torch.cat([args[0][:6], args[0][:1] * float("inf")]), *args[1:])
    assert relative(actual, exact) < bound
    assert torch.equal(actual[:6], beside[:6]) and not beside[6].isfinite().any()


@needs_cpp
def test_last_row_is_read_no_further_than_it_reaches():
    """The weight's memory is followed by NaN-like bytes in one buffer: they must not change the result."""
    codes, scales, _ = weight(5, 24, 2)
    packed = bitpack.pack(codes, 2)
    room = torch.full((packed.numel() + 8,), -1, dtype=torch.int32)
    room[: packed.numel()] = packed.flatten()
    placed = room[: packed.numel()].view(packed.shape)
    x = torch.randn(1, 24)
    assert torch.equal(
        linear(x, placed, scales, None, None, 2, -1), linear(x, packed, scales, None, None, 2, -1)
    )


def test_fp64_runs_the_reference():
    codes, scales, _ = weight(4, 32, 4)
    args = (torch.randn(2, 32, dtype=torch.float64), bitpack.pack(codes, 4), scales, None, None, 4, -1)
    provider, passed = linear.choose(*args)
    assert provider.name == "reference" and "fp64" in dict(passed)["cpu_cpp"]


def _call(**changed):
    codes, scales, zeros = weight(8, 64, 4, 32, zeros=True)
    args = dict(
        x=torch.randn(2, 64),
        codes=bitpack.pack(codes, 4),
        scales=scales,
        zeros=zeros,
        bias=None,
        bits=4,
        group_size=32,
    )
    return linear(*(args | changed).values())


@pytest.mark.parametrize(
    "changed, argument",
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 48}, "group_size"),
        ({"group_size": 128}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"codes": torch.zeros(8, 7, dtype=torch.int32)}, "codes"),
        ({"codes": torch.zeros(8, 8, dtype=torch.int64)}, "codes"),
        ({"scales": torch.ones(8, 1)}, "scales"),
        ({"zeros": torch.zeros(8, 2)}, "zeros"),
        ({"bias": torch.zeros(9)}, "bias"),
        ({"x": torch.zeros(2, 64, dtype=torch.int32)}, "x"),
    ],
)
def test_bad_arguments_are_named(changed, argument):
    with pytest.raises(ArgumentError) as caught:
        _call(**changed)
    assert caught.value.argument == argument


@needs_cpp
@pytest.mark.parametrize("rows", [9, 14, 15, 33])
@pytest.mark.parametrize(
    "outputs, inputs, group, zeros, bias",
    [
        (32, 128, 64, False, False),
        (45, 77, -1, True, True),
        (33, 416, 32, True, False),
        (7, 256, 128, False, True),
        (64, 24, -1, False, True),
    ],
)
def test_many_rows_of_bf16_by_four_bits_agree_with_the_reference(rows, outputs, inputs, group, zeros, bias):
    """Strips of 32 outputs, chunks of 128 inputs, tiles of 14 rows: whole ones and what is left over."""
    args = defs._sample(torch.Generator().manual_seed(3), "cpu", torch.bfloat16, "", (rows,), outputs, inputs, 4,
                          group, zeros, bias, torch.float32).args  # fmt: skip
    op = linear
    expected = op.reference(*args)
    with op.force("cpu_cpp"):
        made = op(*args)
    assert made.shape == expected.shape and made.dtype == torch.bfloat16
    assert float((made.double() - expected.double()).norm() / expected.double().norm()) <= 6e-3


def test_a_row_that_is_not_finite_spoils_no_other():
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    codes, scales = torch.randint(0, 1 << 30, (40, 8), dtype=torch.int32), torch.rand(40, 1)
    whole = torch.ops.thresher.wna16_linear(x, codes, scales, None, None, 4, -1)
    x[3] = float("nan")
    spoiled = torch.ops.thresher.wna16_linear(x, codes, scales, None, None, 4, -1)
    others = [i for i in range(20) if i != 3]
    assert torch.equal(whole[others], spoiled[others]) and spoiled[3].isnan().all()


@pytest.mark.skipif(wna16_cpu.pair_rows(4, 128, 1) == 0, reason="needs AVX512-BF16")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [
        (48, 128, -1),
        (33, 576, 64),
        (13, 77, -1),
        (50, 192, 32),
        (17, 256, 128),
        (17, 64, 8),
        (1, 3, -1),
        (18, 1088, 64),
        (16, 512, 256),
    ],
)
def test_few_rows_of_bf16_are_rounded_once(bits, outputs, inputs, group):
    groups = 1 if group < 0 else inputs // group
    if not (rows := wna16_cpu.pair_rows(bits, inputs, groups)):
        assert bits == 8 and group < 64
        return
    make = torch.Generator().manual_seed(1)
    for m, zeros, kind in ((1, True, torch.float32), (2, False, torch.bfloat16), (3, True, torch.float16),
                           (7, False, torch.float32), (11, True, torch.float32), (rows, True, torch.bfloat16)):  # fmt: skip
        codes, scales, zero = weight(outputs, inputs, bits, group, zeros, kind)
        packed = bitpack.pack(codes, bits)
        x = torch.randn(m, inputs, generator=make).bfloat16()
        bias = torch.randn(outputs, generator=make).bfloat16() if zeros else None
        dense = defs.dequantize(packed, scales, zero, bits, inputs, torch.float64)
        exact = x.double() @ dense.t() + (0 if bias is None else bias.double())
        actual = wna16_cpu.run(x, packed, scales, zero, bias, bits, group)
        most = exact.abs() * 2**-8 + 1e-5 * exact.abs().max()
        assert bool(((actual.double() - exact).abs() <= most).all()), (m, zeros, kind)
        assert torch.equal(actual[:1], wna16_cpu.run(x[:1], packed, scales, zero, bias, bits, group)) or m > 2
