"""Hadamard matrices exist where they should, and the transform is the matrix it says it is."""

import math

import pytest
import torch

from thresher.errors import ArgumentError
from thresher.formats import hadamard as orders
from thresher.kernels.hadamard import cpu as hadamard_cpu
from thresher.kernels.hadamard import op as defs

hadamard = defs.hadamard
CPU = next(p for p in hadamard.providers if p.name == "cpu_cpp")
needs_cpp = pytest.mark.skipif(hadamard.usable(CPU) is not None, reason=str(hadamard.usable(CPU)))


@pytest.mark.parametrize(
    "order, paley, two",
    [
        (1, (), 1),
        (64, (), 64),
        (12, (12,), 1),  # Paley I, q = 11
        (20, (20,), 1),
        (28, (28,), 1),  # Paley I, q = 27, a prime power
        (36, (36,), 1),  # Paley II, q = 17
        (52, (52,), 1),  # Paley II, q = 25
        (576, (36,), 16),
        (1536, (12,), 128),
        (18944, (148,), 128),
        (11008, (344,), 32),  # Paley I, q = 343
    ],
)
def test_known_orders_decompose(order, paley, two):
    assert orders.decompose(order) == (paley, two)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 52, 76, 148, 344, 400, 576])
def test_matrix_is_hadamard_and_orthogonal(order):
    matrix = orders.matrix(order)
    assert torch.equal((matrix * math.sqrt(order)).round().abs(), torch.ones_like(matrix))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(order, dtype=torch.float64), atol=1e-13, rtol=0)


def test_every_reachable_order_below_300_is_hadamard():
    for order in range(1, 300):
        if orders.decompose(order) is None:
            continue
        base = orders.base_matrix(order).double()
        assert torch.equal(base @ base.t(), len(base) * torch.eye(len(base), dtype=torch.float64)), order


def test_orders_without_a_construction_are_refused_with_a_block_that_works():
    unreachable = [n for n in range(4, 257, 4) if orders.decompose(n) is None]
    assert unreachable == [92, 116, 156, 172, 184, 188, 232, 236]
    assert all(orders.decompose(n) is None for n in (3, 6, 7, 10, 30))
    with pytest.raises(ArgumentError, match="power of two that divides it is 8"):
        orders.matrix(184)


def test_transform_is_signs_then_the_matrix():
    make = torch.Generator().manual_seed(3)
    x = torch.randn(4, 576, generator=make, dtype=torch.float64)
    signs = torch.randint(0, 2, (576,), generator=make).double() * 2 - 1
    expected = x @ torch.diag(signs) @ orders.matrix(576)
    torch.testing.assert_close(hadamard(x, signs, 576), expected, atol=1e-12, rtol=0)


def test_transform_keeps_the_product_with_a_rotated_weight():
    make = torch.Generator().manual_seed(4)
    x, w = torch.randn(8, 1536, generator=make), torch.randn(32, 1536, generator=make)
    rotated = hadamard(x, None, 1536) @ hadamard(w, None, 1536).t()
    torch.testing.assert_close(rotated, x @ w.t(), atol=2e-4, rtol=1e-5)


@needs_cpp
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 12, 24, 40, 56, 96, 288, 76, 344])
@pytest.mark.parametrize("blocks", [1, 3])
def test_cpp_agrees_for_each_shape_of_factor(block, blocks):
    make = torch.Generator().manual_seed(block)
    x = torch.randn(5, block * blocks, generator=make)
    signs = torch.randint(0, 2, (block * blocks,), generator=make) * 2.0 - 1
    with hadamard.force("cpu_cpp"):
        actual = hadamard(x, signs, block)
    torch.testing.assert_close(actual, hadamard.reference(x, signs, block), atol=3e-6, rtol=0)


@needs_cpp
def test_cpp_leaves_its_input_alone_and_takes_any_stride():
    x = torch.randn(64, 10).t()
    kept = x.clone()
    with hadamard.force("cpu_cpp"):
        actual = hadamard(x, None, 64)
    assert torch.equal(x, kept)
    torch.testing.assert_close(actual, hadamard.reference(kept, None, 64), atol=3e-6, rtol=0)


@needs_cpp
def test_cpp_gives_the_same_bits_on_any_number_of_threads(monkeypatch):
    x = torch.randn(128, 1536)
    monkeypatch.setattr(hadamard_cpu.torch, "get_num_threads", lambda: 1)
    one = hadamard(x, None, 1536)
    monkeypatch.setattr(hadamard_cpu.torch, "get_num_threads", lambda: 3)
    assert torch.equal(hadamard(x, None, 1536), one)


def test_fp64_runs_the_reference_and_says_why():
    provider, passed = hadamard.choose(torch.ones(2, 4, dtype=torch.float64), None, 4)
    assert provider.name == "reference"
    assert "fp64" in dict(passed)["cpu_cpp"]


@pytest.mark.parametrize(
    "x, signs, block, argument",
    [
        (torch.ones(2, 12), None, 5, "block"),
        (torch.ones(2, 12), None, 0, "block"),
        (torch.ones(2, 6), None, 6, "block"),
        (torch.ones(2, 12, dtype=torch.int64), None, 12, "x"),
        (torch.ones(2, 12), torch.ones(11), 12, "signs"),
        (torch.ones(2, 12), torch.ones(12, dtype=torch.bool), 12, "signs"),
    ],
)
def test_bad_arguments_are_named(x, signs, block, argument):
    with pytest.raises(ArgumentError) as caught:
        hadamard(x, signs, block)
    assert caught.value.argument == argument
