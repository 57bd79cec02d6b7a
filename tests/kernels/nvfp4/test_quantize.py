"""Quantization: each mode's bytes against oracles, scale search, tiles, rotation and bad input."""

import numpy as np
import pytest
import torch
from nvfp4_oracle import ORACLES, distributions, oracle

from thresher.errors import ArgumentError
from thresher.formats.nvfp4 import unpack
from thresher.kernels import native
from thresher.kernels.nvfp4 import cpu as nvfp4_cpu
from thresher.kernels.nvfp4.hadamard import hadamard16, random_hadamard
from thresher.kernels.nvfp4.quantize import MODES, quantize

SMALL, LARGE = 1 << 16, 10 << 20


def check_against_oracle(mode, count):
    for label, x in distributions(count):
        codes, scales, stored = oracle(x, mode)
        q = quantize(x, mode=mode)
        assert np.array_equal(q.block_scales.view(torch.uint8).numpy(), scales), label
        assert np.array_equal(unpack(q.codes).numpy(), codes), label
        kept = q.global_scale if q.stored_global is None else q.stored_global
        assert kept.item() == stored, label


def check_against_torchao(count):
    tool = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for label, x in distributions(count):
        if x.dtype == torch.float16:  # torchao takes bf16 and fp32
            continue
        scale = tool.per_tensor_amax_to_scale(x.abs().max())
        scales, codes = tool.nvfp4_quantize(x, 16, scale)
        q = quantize(x, mode="torchao")
        assert torch.equal(q.codes, codes), label
        assert torch.equal(q.block_scales.view(torch.uint8), scales.view(torch.uint8)), label
        assert torch.equal(q.global_scale, scale), label


@pytest.mark.parametrize("mode", ORACLES)
def test_bytes_equal_the_oracle(mode):
    check_against_oracle(mode, SMALL)


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ORACLES)
def test_bytes_equal_the_oracle_on_ten_million_values(mode):
    check_against_oracle(mode, LARGE)


def test_bytes_equal_torchao():
    check_against_torchao(SMALL)


@pytest.mark.thorough
def test_bytes_equal_torchao_on_ten_million_values():
    check_against_torchao(LARGE)


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("mode", MODES)
def test_fused_kernel_gives_the_bytes_of_the_tensor_arithmetic(mode, monkeypatch):
    odd = torch.randn(7, 77, generator=torch.Generator().manual_seed(1))
    for label, x in [*distributions(SMALL), ("K not a multiple of 16", odd), ("tiny", odd * 1e-41)]:
        fused = quantize(x, mode=mode)
        with monkeypatch.context() as patch:
            patch.setattr(nvfp4_cpu, "accepts", lambda x: False)
            plain = quantize(x, mode=mode)
        assert torch.equal(fused.codes, plain.codes), label
        assert torch.equal(fused.block_scales.view(torch.uint8), plain.block_scales.view(torch.uint8)), label
        assert torch.equal(fused.global_scale, plain.global_scale), label


def relative_mse(x, **options):
    return float((quantize(x, **options).dequantize() - x).square().mean() / x.square().mean())


@pytest.mark.parametrize("mode", MODES)
def test_error_on_normal_data(mode):
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    assert relative_mse(x, mode=mode) == pytest.approx(9.04e-3, rel=0.03)


def test_small_rows_survive_the_least_block_scale():
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    x[1] *= 2.0**-18
    small = {m: quantize(x, mode=m).dequantize()[1] for m in ("thresher", "te")}
    error = {m: float((v - x[1]).square().sum() / x[1].square().sum()) for m, v in small.items()}
    assert error["thresher"] < 0.05 < error["te"]


def test_scale_search_lowers_the_error():
    x = torch.distributions.StudentT(5.0).sample((256, 512))
    plain, four, mse = (relative_mse(x, search=s) for s in ("none", "four_over_six", "mse"))
    assert four < 0.92 * plain and mse < 0.82 * plain


def test_search_is_never_worse_than_plain_for_any_block():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3
    errors = [
        (quantize(x, search=s).dequantize() - x).square().unflatten(-1, (-1, 16)).sum(-1)
        for s in ("none", "mse")
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


def test_tiles_quantize_a_matrix_and_its_transpose_alike():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    tiled = quantize(x, two_dimensional=True).dequantize()
    assert torch.equal(tiled, quantize(x.t().contiguous(), two_dimensional=True).dequantize().t())
    flat = quantize(x).dequantize()
    assert not torch.equal(flat, quantize(x.t().contiguous()).dequantize().t())


def test_tiles_with_a_ragged_last_row_of_tiles():
    x = torch.randn(19, 40)
    q = quantize(x, two_dimensional=True)
    scales = q.block_scales.view(torch.uint8)
    assert scales.shape == (19, 3)
    assert (scales[:16] == scales[0]).all() and (scales[16:] == scales[16]).all()
    assert relative_mse(x, two_dimensional=True, search="mse") <= relative_mse(x, two_dimensional=True)


def test_stochastic_rounding_averages_to_the_input():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    trials = 400
    draws = torch.stack(
        [quantize(x, stochastic=True, generator=generator).dequantize() for _ in range(trials)]
    )
    q = quantize(x)
    unit = (q.block_scales.float() * q.global_scale).repeat_interleave(16, -1)
    inside = x.abs() <= 6 * unit  # a scale rounded down clips its block's maximum
    assert inside.float().mean() > 0.95
    # The widest gap between codes is 2 units, so one draw deviates by at most 1 unit.
    assert ((draws.mean(0) - x).abs() <= 4.5 * unit / trials**0.5)[inside].all()


def test_hadamard_is_orthogonal_and_cancels_in_a_product():
    signs = torch.tensor([1.0, -1.0] * 8)
    h = hadamard16(signs)
    assert torch.equal(h @ h.t(), torch.eye(16))
    a, b = torch.randn(2, 8, 64).double().float()
    product = random_hadamard(a, signs) @ random_hadamard(b, signs).t()
    torch.testing.assert_close(product, a @ b.t(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="multiple of 16"):
        random_hadamard(torch.ones(2, 17))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 16), (1, 5), (0, 32), (4, 0)])
def test_zero_and_empty_tensors(mode, shape):
    q = quantize(torch.zeros(shape), mode=mode)
    assert q.global_scale.isfinite() and q.block_scales.float().isfinite().all()
    assert torch.equal(q.dequantize(), torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused_by_name_or_carried_by_the_scale(bad):
    x = torch.randn(4, 64)
    x[2, 20] = bad
    with pytest.raises(ArgumentError, match=r"model\.fc: got 1 NaN or infinite values"):
        quantize(x, name="model.fc")
    values = quantize(x, nonfinite="propagate").dequantize()
    assert values[2, 16:32].isnan().all() and values.isnan().sum() == 16


def test_values_beyond_a_given_maximum_saturate():
    x = torch.full((1, 16), 10.0)
    assert quantize(x, amax=torch.tensor(2.0)).dequantize().max() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "modelop"}, "Did you mean 'modelopt'"),
        ({"search": "mze"}, "one of"),
        ({"nonfinite": "ignore"}, "propagate"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ArgumentError, match=message):
        quantize(torch.ones(1, 16), **options)


def test_bad_tensors():
    with pytest.raises(ArgumentError, match="float32, bfloat16 or float16"):
        quantize(torch.ones(2, 16, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="matrix"):
        quantize(torch.ones(16), two_dimensional=True)
