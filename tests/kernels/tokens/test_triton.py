"""The Triton kernels of scoring and of the quantized cache, compiled for four generations.

tests/support/interpreted.py runs them.
"""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install --no-deps triton==3.7.1")

import triton_aot as aot

from thresher.kernels.kv import triton_kernels as kv_triton
from thresher.kernels.tokens import triton_kernels as token_triton

FLOATS = {
    "lse": "*fp32",
    "sums": "*fp32",
    "peaks": "*fp32",
    "masses": "*fp32",
    "out": "*fp32",
    "scale": "fp32",
}
TYPES = {
    **FLOATS,
    **{name: "*bf16" for name in ("q", "k", "v", "x", "fx")},
    **{name: "*i32" for name in ("probes", "segments", "seen", "ends")},
    **{name: "*fp32" for name in ("magnitude", "cosine")},
    **{name: "*u8" for name in ("k_codes", "v_codes", "visible")},
    **{name: "*fp16" for name in ("k_affine", "v_affine")},
}
SCORES = dict(SEGMENTED=True, BP=32, BN=64, BLOCK_D=128, PRECISION="ieee")
CACHE = dict(MASKED=True, R=16, D=128, DV=128, BN=32, PRECISION="ieee")
CASES = [
    ("row_lse", token_triton, SCORES, True),
    ("key_sums", token_triton, SCORES, True),
    ("transition", token_triton, dict(BLOCK=2048), False),
    ("pool_part", kv_triton, dict(CACHE, BITS=4), True),
    ("pool_part", kv_triton, dict(CACHE, BITS=2), True),
    ("tail_part", kv_triton, CACHE, True),
    ("merge", kv_triton, dict(R=16, DV=128), False),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.TARGETS)
@pytest.mark.parametrize("name, module, tile, products", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_kernels_fit_and_use_tensor_cores(name, module, tile, products, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(module, name)
    signature = {arg: TYPES.get(arg, "i32") for arg in kernel.arg_names if arg not in tile}
    aligned = [
        arg for arg, kind in signature.items() if kind.startswith("*") or arg.endswith(("_row", "_head"))
    ]
    warps = {"num_warps": 8} if tile is SCORES else {}  # as token_cuda launches them
    binary = aot.compile_for(capability, kernel, signature, tile, aligned=aligned, **warps)
    aot.resources(binary).require_fit(capability, tensor_cores=products)
