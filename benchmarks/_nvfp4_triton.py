"""What the Triton kernels of NVFP4 take on each generation of GPUs, compiled without one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from _harness import Benchmark

SUPPORT = Path(__file__).parents[1] / "tests" / "support"


def triton_kernels(bench: Benchmark) -> None:
    """Registers, spills and tensor-core instructions of every kernel, compiled without a GPU."""
    if importlib.util.find_spec("triton") is None:
        bench.not_measured("Triton kernels ahead of time", "Triton is not installed here.")
        return
    sys.path.insert(0, str(SUPPORT))
    import triton_aot as aot

    from thresher.kernels.nvfp4 import cuda as nvfp4_cuda
    from thresher.kernels.nvfp4 import triton_kernels as nvfp4_triton

    types = dict.fromkeys(("codes", "scales", "a"), "*u8") | dict.fromkeys(("x", "bias", "y"), "*bf16")
    types |= {"global_scale": "*fp32", "alpha": "*fp32"}
    fp4 = {"a_scales": "*fp8e4nv", "scales": "*fp8e4nv"}
    worst = spills = 0
    for capability in aot.CAPABILITIES:
        cases = [("gemv", nvfp4_triton.gemv, nvfp4_cuda.gemv_tile(), {})]
        for rows in (16, 64, 4096):
            tile = nvfp4_cuda.gemm_tile(rows, capability)
            cases.append((f"gemm, {rows} rows", nvfp4_triton.gemm, tile, {}))
        if capability >= 100:
            cases.append(("gemm W4A4", nvfp4_triton.gemm_w4a4, nvfp4_cuda.w4a4_tile(), fp4))
        for name, kernel, tile, changed in cases:
            options = {k: tile[k] for k in ("num_warps", "num_stages") if k in tile}
            constants = {k: v for k, v in tile.items() if k not in options} | {"HAS_BIAS": True}
            names = [n for n in kernel.arg_names if n not in constants]
            signature = {n: {**types, **changed}.get(n, "i32") for n in names}
            aligned = [n for n in names if n not in ("M", "N", "blocks")]
            binary = aot.compile_for(capability, kernel, signature, constants, aligned=aligned, **options)
            found = aot.resources(binary)
            bench.row(kernel=name, sm=capability, registers=found.registers, spills=found.spills + found.stack,
                      shared=found.shared, mma=", ".join(found.mma))  # fmt: skip
            worst, spills = (
                max(worst, found.registers * (name != "gemm W4A4")),
                spills + found.spills + found.stack,
            )
    bench.claim("Triton A16W4 kernels, sm_80 to sm_120: most registers of any", worst, "<= 168")
    bench.claim("Triton kernels: local loads, stores and stack bytes", spills, "== 0")
    without = [r for r in bench.rows if "sm" in r and "gemm" in r["kernel"] and not r["mma"]]
    bench.claim("Triton GEMM kernels without a tensor-core instruction", len(without), "== 0")
