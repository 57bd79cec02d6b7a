"""The Triton kernels without a GPU: compiled ahead of time for four generations, and interpreted.

The interpreter patches Triton for its whole process, so it runs in one of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install --no-deps triton==3.7.1")

import triton.language as tl
import triton_aot as aot
from sampled import sampled

from thresher.kernels.sparse import cuda as sparse_cuda
from thresher.kernels.sparse import triton_kernels as sparse_triton

OPTIONS = ("num_warps", "num_stages")
POINTERS = {
    "act": "*bf16",
    "x": "*bf16",
    "weight": "*bf16",
    "scale": "*fp32",
    "bias": "*bf16",
    "threshold": "*fp32",
    "index": "*i32",
    "value": "*fp32",
    "counts": "*i32",
    "counter": "*i64",
    "partials": "*fp32",
    "out": "*bf16",
}
ODD = ("tokens", "groups", "chunks")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def found(capability, kernel, tile, constants, **pointers):
    options = {name: tile[name] for name in OPTIONS if name in tile}
    constants = constants | {name: value for name, value in tile.items() if name not in OPTIONS}
    types = POINTERS | pointers
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = [name for name in signature if name not in ODD]
    return aot.resources(
        aot.compile_for(capability, kernel, signature, constants, aligned=aligned, **options)
    )


@pytest.mark.parametrize(
    "capability, tokens", sampled([(90, 1), (120, 1), (120, 2)], aot.CAPABILITIES, [1, 2])
)
def test_gemv_fits_and_loads_wide(capability, tokens):
    constants = {"THRESHOLD": 2, "SCALED": False, "CHUNK": sparse_cuda.CHUNK, "BT": tokens, "scale": None}
    report = found(capability, sparse_triton.gemv, sparse_cuda.GEMV, constants)
    report.require_fit(capability)
    assert report.count(r"LDG\.E\S*\.128"), report.sass


@pytest.mark.parametrize(
    "capability, weight",
    sampled([(90, "*i8"), (120, "*bf16"), (120, "*i8")], aot.CAPABILITIES, ["*bf16", "*i8"]),
)
def test_down_of_listed_neurons_uses_tensor_cores(capability, weight):
    scaled = weight == "*i8"
    constants = {"SCALED": scaled, "PRECISION": "tf32", "DTYPE": tl.bfloat16, "CHUNK": sparse_cuda.CHUNK}
    constants |= {"BT": 16} | ({} if scaled else {"scale": None})
    report = found(capability, sparse_triton.down, sparse_cuda.DOWN, constants, weight=weight)
    report.require_fit(capability, tensor_cores=True)


@pytest.mark.parametrize(
    "capability, tokens", sampled([(90, 16), (120, 1), (120, 16)], aot.CAPABILITIES, [1, 16])
)
def test_up_of_listed_neurons_fits(capability, tokens):
    constants = {"SCALED": False, "HAS_BIAS": True, "RELU": True, "PRECISION": "tf32", "scale": None}
    constants |= {"CHUNK": sparse_cuda.CHUNK, "BT": tokens}
    report = found(capability, sparse_triton.up, sparse_cuda.UP, constants)
    report.require_fit(capability, tensor_cores=tokens == 16)


@pytest.mark.parametrize("capability", sampled([120], aot.CAPABILITIES))
def test_compact_and_reduce_fit(capability):
    constants = {"THRESHOLD": 1, "CHUNK": sparse_cuda.CHUNK, "BT": 16}
    found(capability, sparse_triton.compact, {"num_warps": 4}, constants).require_fit(capability)
    constants = {"HAS_BIAS": True, "COUNTED": True, "BC": 64}
    found(capability, sparse_triton.reduce, sparse_cuda.REDUCE, constants).require_fit(capability)


def test_kernels_agree_with_the_reference_under_the_interpreter(tmp_path):
    script = Path(__file__).with_name("sparse_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr[-3000:]
