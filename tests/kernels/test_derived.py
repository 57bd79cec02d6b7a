"""What kernels compute once from a weight."""

import gc
import weakref

import torch

from thresher.kernels.derived import derived


def test_it_is_computed_once_a_name_and_again_after_a_write():
    weight, calls = torch.zeros(3), []

    def double(w):
        calls.append(1)
        return w * 2

    first = derived("double", double, weight)
    assert derived("double", double, weight) is first and len(calls) == 1
    assert derived("another layout", double, weight) is not first and len(calls) == 2
    weight.add_(1)
    assert torch.equal(derived("double", double, weight), torch.full((3,), 2.0)) and len(calls) == 3


def test_another_second_weight_counts():
    codes, scales = torch.ones(2), torch.ones(2)
    assert torch.equal(derived("product", torch.mul, codes, scales), torch.ones(2))
    assert torch.equal(derived("product", torch.mul, codes, torch.full((2,), 3.0)), torch.full((2,), 3.0))


def test_it_does_not_outlive_its_weight():
    weight = torch.zeros(4)
    kept = weakref.ref(derived("copy", torch.clone, weight))
    assert kept() is not None
    del weight
    gc.collect()
    assert kept() is None


def test_a_new_storage_behind_the_same_weight_counts():
    weight = torch.nn.Parameter(torch.ones(3))
    first = derived("double", lambda w: w.detach() * 2, weight)
    weight.data = torch.full((3,), 5.0)
    again = derived("double", lambda w: w.detach() * 2, weight)
    assert torch.equal(first, torch.full((3,), 2.0)) and torch.equal(again, torch.full((3,), 10.0))
