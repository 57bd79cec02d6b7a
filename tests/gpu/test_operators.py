"""Every operator's CUDA providers against its reference, on a GPU: all its own samples in every dtype, strided tensors,
tensors of 3 billion elements, other streams and other devices.

Where there is no GPU the same checks run in Triton's interpreter, on the CPU, in a process of their own.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_checks as checks
import pytest
import torch

CASES = [
    pytest.param(op, provider, dtype, id=f"{op.name}-{provider.name}-{str(dtype).removeprefix('torch.')}")
    for op, provider in checks.providers(foreign=True)
    for dtype in checks.DTYPES
    if dtype in op.tolerance
]
gpu = pytest.mark.gpu


def usable(op, provider):
    reason = op.usable(provider)
    if reason is not None:
        pytest.skip(reason)


def test_there_are_cases_of_every_family():
    names = {case.values[0].name for case in CASES}
    assert {
        "varlen_attention",
        "wna16_linear",
        "nvfp4_linear",
        "sparse_down",
        "kv_attention",
        "hadamard",
    } <= names
    assert len(CASES) >= 30


@gpu
@pytest.mark.parametrize("op, provider, dtype", CASES)
def test_agrees_with_the_reference(op, provider, dtype):
    usable(op, provider)
    ran = checks.every_sample(op, provider, dtype, checks.CARD)
    assert ran or dtype != torch.bfloat16, "the provider took none of the samples"


@gpu
@pytest.mark.parametrize("op, provider, dtype", CASES)
def test_strided_tensors(op, provider, dtype):
    usable(op, provider)
    checks.strided(op, provider, dtype, checks.CARD)


@gpu
@pytest.mark.parametrize("check", checks.LARGE, ids=lambda c: c.__name__)
def test_beyond_32_bits(check):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("takes 40 GiB of the GPU's memory")
    check(checks.CARD, torch.bfloat16)
    torch.cuda.empty_cache()


@gpu
@pytest.mark.parametrize("op, provider, dtype", [c for c in CASES if c.values[2] == torch.bfloat16])
def test_a_stream_of_the_callers_own(op, provider, dtype):
    """A call is ordered on the caller's stream: what was enqueued before it is what it reads."""
    usable(op, provider)
    stream = torch.cuda.Stream()
    for sample in op.inputs(torch.device("cuda"), dtype)[:3]:
        if not checks.takes(provider, sample.args):
            continue
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            given = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args)
            actual = checks.call(op, provider, given, checks.CARD)
        stream.synchronize()
        for a, e in zip(actual, checks.tensors(op.reference(*sample.args)), strict=True):
            assert checks.relative_error(a, e) <= op.tolerance[dtype]


@gpu
@pytest.mark.parametrize("op, provider, dtype", [c for c in CASES if c.values[2] == torch.bfloat16])
def test_the_second_device(op, provider, dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    usable(op, provider)
    place = checks.Place(torch.device("cuda:1"), 0)
    checks.every_sample(op, provider, dtype, place)


@gpu
@pytest.mark.parametrize("op, provider, dtype", [c for c in CASES if c.values[2] == torch.bfloat16])
def test_a_first_call_takes_a_second_and_no_memory_is_kept(op, provider, dtype):
    usable(op, provider)
    sample = next((s for s in op.inputs(torch.device("cuda"), dtype) if checks.takes(provider, s.args)), None)
    if sample is None:
        pytest.skip("the provider took none of the samples")
    if provider.name not in checks.FOREIGN:
        torch.cuda.synchronize()
        started = time.perf_counter()
        checks.call(op, provider, sample.args, checks.CARD)
        torch.cuda.synchronize()
        assert time.perf_counter() - started <= 1.0
    for _ in range(3):
        checks.call(op, provider, sample.args, checks.CARD)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        checks.call(op, provider, sample.args, checks.CARD)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.slow
@pytest.mark.parametrize("part", ["samples", "edges", pytest.param("orders", marks=pytest.mark.thorough)])
def test_the_same_checks_run_without_a_gpu(part):
    """In the interpreter: addresses watched, memory poisoned, programs in any order; and the checks above, small."""
    pytest.importorskip("triton")
    script = Path(__file__).resolve().parents[1] / "support" / "interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, part], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0 and "agrees" in done.stdout, (done.stdout[-2000:], done.stderr[-3000:])
