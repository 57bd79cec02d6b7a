"""Attention of bf16 rows by products of pairs: with the instructions for it and without, and beside tiles."""

import ctypes
import subprocess

import pytest
import torch

from thresher import op_checks, ops
from thresher.kernels import catalog, native
from thresher.kernels.varlen import cpu

catalog.load()
BF16 = torch.bfloat16
NAMES = ("varlen_attention", "varlen_attention_masked")
needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason="needs a C++ compiler")


def without_instructions(folder, machine):
    """The kernel for bf16, built for a CPU that has no products of pairs."""
    library = folder / "varlen_bf16.so"
    flags = [f for f in native._FLAGS if not f.startswith("-march")]
    source = native._SOURCES / "varlen_bf16.cpp"
    subprocess.run([native.compiler(), *flags, *machine, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@needs_compiler
@pytest.mark.parametrize(
    "machine",
    [("-march=native", "-mno-avx512bf16"), ("-march=native", "-mno-avx512f")],
    ids=["avx512", "avx2"],
)
def test_the_form_without_instructions_agrees_with_the_reference(monkeypatch, tmp_path, machine):
    built, load = without_instructions(tmp_path, machine), native.load
    assert built.thresher_varlen_bf16_products() == 0
    monkeypatch.setattr(native, "load", lambda name: built if name == "varlen_bf16" else load(name))
    monkeypatch.setattr(cpu, "multiplies_pairs", lambda: True)
    for name in NAMES:
        op = ops.get(name)
        for sample in op.inputs(torch.device("cpu"), BF16):
            with op.force("cpu_cpp"):
                made = op(*sample.args)
            assert made.dtype == BF16
            error = op_checks.difference(made, op.reference(*sample.args))
            assert error <= op.tolerance[BF16], (name, sample.label, error)


@needs_compiler
def test_a_segment_does_not_hang_on_others():
    """Bit for bit, whatever stands beside it: NaN included."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 70, 24, dtype=BF16)
    ends = torch.tensor([0, 33, 64, 70], dtype=torch.int32)
    changed = q.clone()
    changed[:, :, :33] = float("nan")
    first, second = (cpu._varlen_cpp(x, x, x, ends, 33, 0.2, True, -1, 0.0) for x in (q, changed))
    assert torch.equal(first[:, :, 33:], second[:, :, 33:]) and second[:, :, :33].isnan().all()


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_where_the_cpu_has_tiles_the_faster_of_both_is_taken(monkeypatch, name, gain):
    monkeypatch.setattr(native, "cpu_features", lambda: frozenset({"amx_bf16"}))
    asked = []
    monkeypatch.setattr(cpu, "gain_over_tiles", lambda *shape: asked.append(shape) or gain)
    op = ops.get(name)
    sample = op.inputs(torch.device("cpu"), BF16)[0]
    chosen, passed = op.choose(*sample.args)
    assert chosen.name == ("cpu_cpp" if gain > 1 else "cpu_sdpa")
    assert asked and all(shape[0] in cpu._TIMED for shape in asked)
    assert gain > 1 or "measured to be faster" in dict(passed)["cpu_cpp"]
    asked.clear()
    assert (
        op.choose(*op.inputs(torch.device("cpu"), torch.float32)[0].args)[0].name == "cpu_cpp" and not asked
    )


@needs_compiler
def test_tiles_are_timed_once_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    cpu.gain_over_tiles.cache_clear()
    gain = cpu.gain_over_tiles(16, 8, BF16)
    assert gain > 0
    cpu.gain_over_tiles.cache_clear()
    monkeypatch.setattr(cpu.sparse_tune, "least_seconds", lambda forms: pytest.fail("timed again"))
    assert cpu.gain_over_tiles(16, 8, BF16) == gain
    cpu.gain_over_tiles.cache_clear()
