"""The Triton kernels of the low-bit linear and of the Hadamard transform without a GPU: compiled ahead of time for
four generations, and interpreted. The interpreter patches Triton for its whole process, so it runs in its own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install --no-deps triton==3.7.1")

import triton_aot as aot
from sampled import sampled

from thresher.kernels.hadamard import cuda as hadamard_cuda
from thresher.kernels.wna16 import cuda as wna16_cuda
from thresher.kernels.wna16 import triton_kernels as wna16_triton

BITS = (2, 3, 4, 8)
# Codes that lie across words at every tile, codes that do not at one.
GEMMS = [(90, 4, 64), (120, 3, 16), (120, 3, 64), (120, 3, 4096), (120, 4, 64)]
OPTIONS = ("num_warps", "num_stages")
TYPES = {"codes": "*i32", "scales": "*fp32", "zeros": "*u8", "x": "*bf16", "bias": "*bf16", "y": "*bf16"}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(capability, kernel, tile, bits):
    constants = {name: value for name, value in tile.items() if name not in OPTIONS}
    constants |= {"BITS": bits, "ZEROS": True, "HAS_BIAS": True}
    signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names if name not in constants}
    options = {name: tile[name] for name in OPTIONS if name in tile}
    aligned = [name for name in signature if name not in ("M", "N", "groups", "words")]
    return aot.resources(
        aot.compile_for(capability, kernel, signature, constants, aligned=aligned, **options)
    )


@pytest.mark.parametrize(
    "capability, bits", sampled([(90, 3), *((120, bits) for bits in BITS)], aot.CAPABILITIES, BITS)
)
def test_gemv_fits_in_registers(capability, bits):
    compiled(capability, wna16_triton.gemv, wna16_cuda.gemv_tile(), bits).require_fit(capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability, bits, rows", sampled(GEMMS, aot.CAPABILITIES, [3, 4], [16, 64, 4096]))
def test_gemm_fits_and_uses_tensor_cores(capability, rows, bits):
    found = compiled(capability, wna16_triton.gemm, wna16_cuda.gemm_tile(rows), bits)
    found.require_fit(capability, tensor_cores=True)


@pytest.mark.parametrize("capability, block", sampled([(120, 1536)], aot.CAPABILITIES, [1536, 2048]))
def test_hadamard_fits(capability, block):
    height, width = hadamard_cuda.factors(block)
    signature = {"x": "*bf16", "signs": "*fp32", "left": "*fp32", "y": "*bf16", "height": "i32", "width": "i32",
                 "blocks": "i32", "scale": "fp32"}  # fmt: skip
    constants = {"SIGNED": True, "H": max(16, 1 << (height - 1).bit_length()), "W": max(16, width)}
    binary = aot.compile_for(
        capability, hadamard_cuda.transform, signature, constants, aligned=("x", "y"), num_warps=8
    )
    aot.resources(binary).require_fit(capability)


INTERPRETED = """
import torch
from thresher.kernels.hadamard import op as hadamard
from thresher.kernels.wna16 import linear as wna16
from thresher.kernels.wna16.cuda import launch
from thresher.kernels.hadamard import cuda as hadamard_cuda

torch.manual_seed(0)
for bits in (2, 3, 4, 8):
    for m, n, k, group, zeros, dtype, gemv in [
        (2, 9, 77, -1, True, torch.float32, True),
        (1, 20, 320, 64, False, torch.float32, True),
        (3, 20, 96, 32, True, torch.float16, False),
    ]:
        sample = wna16._sample(torch.Generator().manual_seed(1), "cpu", dtype, "", (m,), n, k, bits, group, zeros, True,
                               torch.float32)
        y = launch(*sample.args, gemv=gemv)
        expected = wna16.wna16_linear.reference(*(a.double() if i in (0, 4) else a for i, a in enumerate(sample.args)))
        error = float((y.double() - expected).norm() / expected.norm())
        assert error < (1e-6 if dtype == torch.float32 else 1e-3), (bits, m, n, k, error)
for width, block, signed in [(96, 96, True), (128, 64, False), (60, 20, True), (6, 2, True)]:
    x = torch.randn(3, width)
    signs = torch.randint(0, 2, (width,)) * 2.0 - 1 if signed else None
    y = hadamard_cuda.launch(x, signs, block)
    expected = hadamard.hadamard.reference(x.double(), signs, block)
    assert float((y - expected).norm() / expected.norm()) < 1e-6, (width, block)
print("agrees")
"""


def test_kernels_agree_with_the_reference_under_the_interpreter(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr[-3000:]
