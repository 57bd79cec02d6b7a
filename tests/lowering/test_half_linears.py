"""Linears of half types become half_linear in lowered programs on a CPU that does not multiply them."""

import pytest
import torch
from two_linears import Two, graph_of

from thresher.kernels import half_linear, native
from thresher.lowering import half_linears

needs_kernel = pytest.mark.skipif(native.load_error("half_linear") is not None, reason="no C++ compiler")
HALVES = pytest.mark.parametrize("dtype", half_linear.HALVES, ids=str)


@pytest.fixture
def without_instructions(monkeypatch):
    """As on a CPU that multiplies no half type."""
    monkeypatch.setattr(half_linear, "gains", lambda dtype: dtype in half_linear.HALVES)


@HALVES
def test_half_linears_of_any_number_of_tokens_are_rewritten(without_instructions, dtype):
    for tokens in (1, 3, 70):
        graph = graph_of(Two().to(dtype).eval(), torch.randn(tokens, 64).to(dtype))
        assert half_linears.rewrite(graph) == 2
        assert not any(n.target is torch.ops.aten.linear.default for n in graph.nodes)


def test_fp32_and_cpus_with_instructions_are_left_alone(without_instructions, monkeypatch):
    assert half_linears.rewrite(graph_of(Two().eval(), torch.randn(3, 64))) == 0
    monkeypatch.setattr(half_linear, "gains", lambda dtype: False)
    assert half_linears.rewrite(graph_of(Two().half().eval(), torch.randn(3, 64).half())) == 0


@needs_kernel
@HALVES
def test_the_error_is_the_last_rounding_alone(dtype):
    """Sums in fp32: beside the exact product, an element is off by half a unit in its last place and what fp32 loses."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=g).to(dtype) for size in ((67, 1100), (90, 1100), (90,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got = half_linear.half_linear.direct(x, weight, bias).double()
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-4
    assert ((got - exact).abs() <= allowed).all()


@needs_kernel
@HALVES
def test_two_threads_give_the_same_bits_as_one(dtype):
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(130, 300, generator=g).to(dtype), torch.randn(530, 300, generator=g).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(half_linear.half_linear.direct(x, weight, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@needs_kernel
@HALVES
def test_nan_and_infinity_stay(dtype):
    x, weight = torch.ones(30, 40).to(dtype), torch.ones(20, 40).to(dtype)
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    y = half_linear.half_linear.direct(x, weight, None)
    assert y[3].isnan().all() and y[4].isinf().all() and torch.equal(y[5], torch.full((20,), 40.0).to(dtype))


def test_no_kernel_is_built_where_the_cpu_has_the_instructions(monkeypatch):
    asked = []
    monkeypatch.setattr(native, "load_error", asked.append)
    monkeypatch.setattr(half_linear, "_multiplies", lambda dtype: True)
    assert not any(half_linear.gains(dtype) for dtype in half_linear.TYPES) and not asked
    monkeypatch.setattr(half_linear, "_multiplies", lambda dtype: False)
    assert [half_linear.gains(dtype) for dtype in half_linear.TYPES] == [False, True, True]
    assert asked == ["half_linear"] * 2
