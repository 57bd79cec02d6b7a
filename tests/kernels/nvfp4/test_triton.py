"""The Triton kernels without a GPU: compiled ahead of time for four generations, and interpreted.

The interpreter patches Triton for its whole process, so it runs in one of its own.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install --no-deps triton==3.7.1")

import triton_aot as aot
from sampled import sampled

from thresher.kernels.nvfp4 import cuda as nvfp4_cuda
from thresher.kernels.nvfp4 import triton_kernels as nvfp4_triton

OPTIONS = ("num_warps", "num_stages")
SIGNATURE = {
    "codes": "*u8",
    "scales": "*u8",
    "global_scale": "*fp32",
    "x": "*bf16",
    "bias": "*bf16",
    "y": "*bf16",
}


def compiled(capability, kernel, tile, signature):
    signature = {name: signature.get(name, "i32") for name in kernel.arg_names if name not in tile}
    signature.pop("HAS_BIAS")
    constants = {name: value for name, value in tile.items() if name not in OPTIONS} | {"HAS_BIAS": True}
    options = {name: tile[name] for name in OPTIONS if name in tile}
    aligned = [name for name in signature if name not in ("M", "N", "blocks")]
    return aot.compile_for(capability, kernel, signature, constants, aligned=aligned, **options)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", sampled([120], aot.CAPABILITIES))
def test_gemv_fits_in_registers(capability):
    found = aot.resources(compiled(capability, nvfp4_triton.gemv, nvfp4_cuda.gemv_tile(), SIGNATURE))
    found.require_fit(capability)
    assert found.registers <= 80, found


GEMMS = [(90, 64), (120, 16), (120, 4096)]


@pytest.mark.parametrize("capability, rows", sampled(GEMMS, aot.CAPABILITIES, [16, 64, 4096]))
def test_gemm_fits_and_uses_tensor_cores(capability, rows):
    tile = nvfp4_cuda.gemm_tile(rows, capability)
    found = aot.resources(compiled(capability, nvfp4_triton.gemm, tile, SIGNATURE))
    found.require_fit(capability, tensor_cores=True)
    assert found.registers <= 168, found
    if rows >= 64 and capability in (90, 100):  # smaller tiles stay on the older instructions
        assert any(name.startswith("HGMMA" if capability == 90 else "UTC") for name in found.mma), found


@pytest.mark.parametrize("capability", [pytest.param(100, marks=pytest.mark.thorough), 120])
def test_w4a4_multiplies_fp4_in_hardware(capability):
    signature = {**SIGNATURE, "a": "*u8", "a_scales": "*fp8e4nv", "scales": "*fp8e4nv", "alpha": "*fp32"}
    binary = compiled(capability, nvfp4_triton.gemm_w4a4, nvfp4_cuda.w4a4_tile(), signature)
    aot.resources(binary).require_fit(capability, tensor_cores=True)
    assert "kind::mxf4nvf4.block_scale.scale_vec::4X" in binary.asm["ptx"]


INTERPRETED = """
import torch
from thresher.kernels.nvfp4.linear import nvfp4_linear
from thresher.kernels.nvfp4.cuda import a16w4
from thresher.kernels.nvfp4.quantize import quantize

torch.manual_seed(0)
for m, n, k, dtype, gemv in [
    (1, 20, 72, torch.float32, True),
    (2, 9, 300, torch.float16, True),
    (3, 20, 72, torch.float16, False),
    (2, 70, 150, torch.float16, False),
]:
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    q = quantize(torch.randn(n, k) * torch.logspace(0, -14, n, base=2)[:, None])  # subnormal scales too
    y = a16w4(x, q.codes, q.block_scales, q.global_scale, bias, gemv=gemv)
    expected = nvfp4_linear.reference(x, q.codes, q.block_scales, q.global_scale, None, bias)
    error = float((y.double() - expected.double()).norm() / expected.double().norm())
    assert error < (1e-6 if dtype == torch.float32 else 5e-4), (m, n, k, error)
    q.block_scales.view(torch.uint8)[4, 1] = 0x7F
    y = a16w4(x, q.codes, q.block_scales, q.global_scale, None, gemv=gemv)
    assert y[:, 4].isnan().all() and y[:, :4].isfinite().all() and y[:, 5:].isfinite().all()
print("agrees")
"""


def test_kernels_agree_with_the_reference_under_the_interpreter(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr[-3000:]
