"""FP4 tensor cores: who multiplies on which GPU, and what torch's scaled product is given, by a stand-in that computes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from thresher.formats.nvfp4 import decode_e2m1, unpack, unswizzle
from thresher.kernels import derived, optional_triton
from thresher.kernels.nvfp4 import cuda as nvfp4_cuda
from thresher.kernels.nvfp4.linear import nvfp4_linear
from thresher.kernels.nvfp4.quantize import quantize

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class ScaledProduct:
    """`torch.nn.functional.scaled_mm` for NVFP4 as its documentation has it, in fp32, with every call noted."""

    def __init__(self):
        self.calls = []

    def __call__(
        self,
        a,
        b,
        scale_a,
        scale_recipe_a,
        scale_b,
        scale_recipe_b,
        swizzle_a,
        swizzle_b,
        output_dtype,
        **more,
    ):
        from torch.nn.functional import ScalingType, SwizzleType

        assert not more
        assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
        assert a.is_contiguous() and b.t().is_contiguous()  # the hardware multiplies row by column
        for recipe in (scale_recipe_a, scale_recipe_b):
            assert list(recipe) == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        for layout in (swizzle_a, swizzle_b):
            assert list(layout) == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
        self.calls.append((a, b, scale_a, scale_b))
        left, right = (self._values(m, s) for m, s in ((a, scale_a), (b.t(), scale_b)))
        return (left @ right.t() * (scale_a[1] * scale_b[1])).to(output_dtype)

    @staticmethod
    def _values(codes, scales):
        blocks, tensor = scales
        assert blocks.dtype == torch.float8_e4m3fn and blocks.is_contiguous() and tensor.dim() == 0
        rows, columns = codes.shape[0], codes.shape[1] * 2 // 16
        assert blocks.numel() == -(-rows // 128) * 128 * (-(-columns // 4) * 4)  # padded to whole tiles
        plain = unswizzle(blocks, rows, columns).float()
        values = decode_e2m1(unpack(codes.view(torch.uint8))).unflatten(-1, (-1, 16))
        return (values * plain[..., None]).flatten(-2)


@pytest.fixture
def product(monkeypatch):
    made = ScaledProduct()
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", made)
    return made


def provider(name):
    return next(p for p in nvfp4_linear.providers if p.name == name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, outputs, inputs", [(1, 16, 32), (5, 48, 96), (130, 144, 320)])
def test_the_native_product_is_the_emulated_one(rows, outputs, inputs, dtype, product):
    make = torch.Generator().manual_seed(rows)
    q = quantize(torch.randn(outputs, inputs, generator=make))
    x, bias = (
        torch.randn(2, rows, inputs, generator=make).to(dtype),
        torch.randn(outputs, generator=make).to(dtype),
    )
    for scale in (None, torch.tensor([6.0 / 2688])):
        args = (x, q.codes, q.block_scales, q.global_scale, scale, bias, "nvfp4")
        actual, expected = provider("scaled_mm").run(*args), nvfp4_linear.reference(*args)
        assert actual.shape == expected.shape and actual.dtype == dtype
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error <= (2e-6 if dtype == torch.float32 else 6e-3), error
    assert len(product.calls) == 2


def test_a_weights_scales_are_swizzled_once_and_anew_when_they_change(product, monkeypatch):
    q = quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 64)
    args = (x, q.codes, q.block_scales, q.global_scale, None, None, "nvfp4")
    for _ in range(3):
        before = provider("scaled_mm").run(*args)
    held = [scale_b[0] for _, _, _, scale_b in product.calls]
    assert held[0].data_ptr() == held[1].data_ptr() == held[2].data_ptr()
    q.block_scales.view(torch.uint8)[:2] = 0
    after = provider("scaled_mm").run(*args)
    assert not after[:, :2].any() and torch.equal(after[:, 2:], before[:, 2:])
    assert derived.derived is nvfp4_cuda.derived


TABLE = {
    (7, 5): {"nvfp4": "reference", "exact": "reference"},
    (8, 0): {"nvfp4": "triton_rounded", "exact": "triton_gemm"},
    (8, 6): {"nvfp4": "triton_rounded", "exact": "triton_gemm"},
    (8, 9): {"nvfp4": "triton_rounded", "exact": "triton_gemm"},
    (9, 0): {"nvfp4": "triton_rounded", "exact": "triton_gemm"},
    (10, 0): {"nvfp4": "scaled_mm", "exact": "triton_gemm"},
    (10, 3): {"nvfp4": "scaled_mm", "exact": "triton_gemm"},
    (12, 0): {"nvfp4": "scaled_mm", "exact": "triton_gemm"},
}


@pytest.mark.skipif(optional_triton.MISSING is not None, reason=str(optional_triton.MISSING))
@pytest.mark.parametrize("capability", TABLE, ids=str)
def test_the_gpu_decides_who_multiplies(capability, monkeypatch):
    monkeypatch.setattr(nvfp4_cuda, "_capability", lambda: capability)
    monkeypatch.setattr(nvfp4_linear, "_usable", {})
    with FakeTensorMode():
        x = torch.empty(16, 64, dtype=torch.bfloat16, device="cuda")
        codes = torch.empty(32, 32, dtype=torch.uint8, device="cuda")
        scales, fewer = (torch.empty(n, 4, dtype=torch.float8_e4m3fn, device="cuda") for n in (32, 20))
        scale = torch.empty((), device="cuda")
        for activations, name in TABLE[capability].items():
            chosen, passed = nvfp4_linear.choose(x, codes, scales, scale, None, None, activations)
            assert chosen.name == name, passed
        odd = torch.empty(20, 32, dtype=torch.uint8, device="cuda"), fewer
        chosen, passed = nvfp4_linear.choose(x, *odd, scale, None, None, "nvfp4")
        assert chosen.name == ("reference" if capability < (8, 0) else "triton_rounded")
        assert capability < (10, 0) or "multiples of 16" in dict(passed)["scaled_mm"]
        one = torch.empty(1, 64, dtype=torch.bfloat16, device="cuda")
        chosen, _ = nvfp4_linear.choose(one, codes, scales, scale, None, None, "exact")
        assert chosen.name == ("reference" if capability < (8, 0) else "triton_gemv")
