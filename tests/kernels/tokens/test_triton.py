"""The Triton kernels of scoring and of the quantized cache, compiled for four generations.

tests/support/interpreted.py runs them.
"""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install --no-deps triton==3.7.1")

import triton_aot as aot
from sampled import sampled

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
KERNELS = {
    "row_lse": (token_triton.row_lse, SCORES, True),
    "key_sums": (token_triton.key_sums, SCORES, True),
    "transition": (token_triton.transition, dict(BLOCK=2048), False),
    "pool_part of 4 bits": (kv_triton.pool_part, dict(CACHE, BITS=4), True),
    "pool_part of 2 bits": (kv_triton.pool_part, dict(CACHE, BITS=2), True),
    "tail_part": (kv_triton.tail_part, CACHE, True),
    "merge": (kv_triton.merge, dict(R=16, DV=128), False),
}
PLAIN = [(90, "row_lse"), (90, "pool_part of 4 bits"), *((120, name) for name in KERNELS)]


@pytest.mark.slow
@pytest.mark.parametrize("capability, name", sampled(PLAIN, aot.CAPABILITIES, KERNELS))
def test_kernels_fit_and_use_tensor_cores(capability, name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, tile, products = KERNELS[name]
    signature = {arg: TYPES.get(arg, "i32") for arg in kernel.arg_names if arg not in tile}
    aligned = [
        arg for arg, kind in signature.items() if kind.startswith("*") or arg.endswith(("_row", "_head"))
    ]
    warps = {"num_warps": 8} if tile is SCORES else {}  # as token_cuda launches them
    binary = aot.compile_for(capability, kernel, signature, tile, aligned=aligned, **warps)
    aot.resources(binary).require_fit(capability, tensor_cores=products)
