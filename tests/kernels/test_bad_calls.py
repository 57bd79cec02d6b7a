"""Arguments that do not belong together are refused before a kernel reads memory by them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thresher import ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog, native

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "bad_calls.py"
catalog.load()


def _run(*options: str, **environment: str) -> None:
    """The script's process must end by itself and find nothing; its last line says what it was at."""
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip
    last = done.stderr.split("\r")[-1]
    assert done.returncode == 0, f"exit {done.returncode}; at {last[-3000:]}\n{done.stdout[-3000:]}"
    assert " 0 faults" in done.stdout


def test_a_damaged_call_raises_or_equals_the_reference():
    _run("--each", "40")


@pytest.mark.thorough
def test_every_damaged_call_raises_or_equals_the_reference():
    _run()


@pytest.fixture
def sanitizers(tmp_path):
    """The environment of a process whose kernels are built under address and undefined-behaviour checks."""
    compiler = native.compiler()
    # libstdc++ too: the sanitizer looks for what throws before torch has loaded one, and else ends at the first throw
    asked = [[compiler or "g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    found = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in asked]
    if not all(Path(library).is_absolute() for library in found):
        pytest.skip("the compiler brings no address sanitizer")
    return dict(LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0", THRESHER_CACHE_DIR=str(tmp_path))


@pytest.mark.thorough
def test_sanitizers_find_nothing_in_the_kernels(sanitizers):
    _run("--sanitize", "--each", "200", **sanitizers)


@pytest.mark.thorough
def test_sanitizers_find_nothing_in_steps(sanitizers):
    tests = SCRIPT.parents[1] / "lowering" / "steps"
    done = subprocess.run([sys.executable, str(SCRIPT.with_name("sanitized.py")), str(tests)], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **sanitizers})  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("op", ops.all_ops(), ids=lambda op: op.name)
def test_every_operator_has_a_check(op):
    assert op.check is not None
    for sample in op.inputs(torch.device("cpu"), torch.float32):
        op.check(*sample.args)


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ArgumentError, match="tensors on cpu and meta"):
        ops.get("few_linear").direct(torch.ones(1, 8), torch.ones(4, 8, device="meta"), None, False)


def test_a_check_runs_before_the_reference_too():
    op = ops.get("few_linear")
    with op.force("reference"), pytest.raises(ArgumentError, match="bias"):
        op(torch.ones(1, 8), torch.ones(4, 8), torch.ones(3), False)


def test_an_error_of_an_index_names_it_and_its_range():
    q = torch.ones(1, 2, 4, 8)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    mask, rows, cols = (
        torch.ones(2, 1, 4, 4, dtype=torch.bool),
        torch.zeros(4, dtype=torch.long),
        torch.arange(4),
    )
    attention = ops.get("varlen_attention_masked")
    for name, args in (("rows", (rows + 2, cols)), ("cols", (rows, cols + 1)), ("rows", (rows - 2, cols))):
        with pytest.raises(ArgumentError, match=f"^{name}: got indices from"):
            attention(q, q, q, mask, *args, ends, 4, 0.3)
    mixed = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ArgumentError, match="row 1, column 2 at token 2"):
        attention(q, q, q, mask, mixed, cols, ends, 4, 0.3)


def test_a_scale_that_pytorch_attention_gets_wrong_runs_the_reference():
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    op = ops.get("varlen_attention")
    for scale in (0.0, -0.5):
        result = op(q, q, q, ends, 4, scale, True, -1, 0.0)
        torch.testing.assert_close(result, op.reference(q, q, q, ends, 4, scale, True, -1, 0.0))
        assert result.isfinite().all()
