"""NVFP4 training: the three products, the paper's switches, and what swapping changes in a model."""

import copy

import pytest
import torch
from torch import nn

import thresher
from thresher.errors import ArgumentError
from thresher.kernels.nvfp4.hadamard import hadamard16, random_hadamard
from thresher.kernels.nvfp4.quantize import quantize
from thresher.training.nvfp4 import PAPER, NVFP4Linear, TrainingRecipe, fake_quantize, restore, use_recipe

EXACT = TrainingRecipe(forward=False, dgrad=False, wgrad=False)


def linear(k=48, n=32, recipe=PAPER, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=bias))
    thresher.nvfp4_training(model, recipe, keep=())
    return model[0]


def gradients(layer, x, grad):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (33, 40), (1, 16), (0, 32), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_quantizer(shape, tiled, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x * torch.logspace(0, -20, shape[0], base=2)[:, None].to(dtype)
    expected = quantize(x, two_dimensional=tiled).dequantize()
    assert torch.equal(fake_quantize(x, tiled=tiled), expected)


def test_poisoned_gradients_stay_visible():
    x = torch.ones(2, 32)
    x[0, 3] = float("nan")
    assert fake_quantize(x)[0].isnan().any()
    x[0, 3] = float("inf")
    assert not fake_quantize(x)[0, :16].isfinite().all()


def test_stochastic_rounding_is_unbiased_to_four_sigma():
    torch.manual_seed(0)
    x, trials = torch.randn(4, 32), 4000
    drawn = torch.stack([fake_quantize(x, stochastic=True) for _ in range(trials)])
    sigma = drawn.std(0) / trials**0.5
    q = quantize(x)  # a block scale that was rounded down clips the block's maximum to 6 times itself
    limit = (6 * q.block_scales.float() * q.global_scale).repeat_interleave(16, -1)
    assert ((drawn.mean(0) - x.clamp(-limit, limit)).abs() <= 4 * sigma + 1e-6).all()
    assert (drawn.std(0) > 0).float().mean() > 0.8  # it does draw


def test_forward_and_dgrad_see_the_same_weight_with_tiles_only():
    grad = torch.eye(32)
    for tiled, same in ((True, True), (False, False)):
        recipe = TrainingRecipe(tiled=tiled, stochastic=False)
        layer = linear(recipe=recipe, bias=False)
        with torch.no_grad():  # unit inputs are exact in NVFP4: the products read the weight out
            seen_forward = layer(torch.eye(48)).t()
        _, seen_backward, _ = gradients(layer, torch.zeros(32, 48), grad)
        assert torch.equal(seen_forward, seen_backward) == same


def test_the_transform_is_orthogonal_and_cancels_in_wgrad():
    signs = linear().signs
    h = hadamard16(signs)
    assert torch.allclose(h @ h.t(), torch.eye(16), atol=1e-6)
    a, b = torch.randn(8, 32), torch.randn(6, 32)
    torch.testing.assert_close(random_hadamard(a, signs) @ random_hadamard(b, signs).t(), a @ b.t())


def test_with_everything_off_it_is_a_linear():
    layer, x, grad = linear(recipe=EXACT), torch.randn(7, 48), torch.randn(7, 32)
    plain = nn.Linear(48, 32)
    plain.load_state_dict(layer.state_dict())
    for ours, theirs in zip(gradients(layer, x, grad), gradients(plain, x, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("which", ["forward", "dgrad", "wgrad"])
def test_each_switch_rounds_its_product_alone(which):
    x, grad = torch.randn(20, 48), torch.randn(20, 32)
    exact = gradients(linear(recipe=EXACT), x, grad)
    one = TrainingRecipe(**{"forward": False, "dgrad": False, "wgrad": False, which: True})
    rounded = gradients(linear(recipe=one), x, grad)
    for name, a, b in zip(("forward", "dgrad", "wgrad"), rounded, exact, strict=True):
        error = float((a - b).norm() / b.norm())
        assert (0.05 < error < 0.35) if name == which else error < 1e-6, (name, error)


def test_products_are_those_of_the_paper():
    x, grad = torch.randn(20, 48), torch.randn(20, 32)
    layer = linear(recipe=TrainingRecipe(stochastic=False), bias=False)
    y, dx, dw = gradients(layer, x, grad)
    w = quantize(layer.weight, two_dimensional=True).dequantize()
    torch.testing.assert_close(y, quantize(x).dequantize() @ w.t())
    torch.testing.assert_close(dx, quantize(grad).dequantize() @ w)
    turned = [nn.functional.pad(t.t(), (0, 12)) for t in (grad, x)]
    left, right = (quantize(random_hadamard(t, layer.signs)).dequantize() for t in turned)
    torch.testing.assert_close(dw, left @ right.t())


def test_only_gradients_are_drawn():
    x, grad = torch.randn(16, 48), torch.randn(16, 32)
    first, second = (gradients(linear(), x, grad) for _ in range(2))
    assert torch.equal(first[0], second[0])
    torch.manual_seed(1)
    layer = linear()
    torch.manual_seed(2)
    third = gradients(layer, x, grad)
    assert torch.equal(first[0], third[0])
    assert not torch.equal(first[1], third[1]) and not torch.equal(first[2], third[2])


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4))
        self.lm_head = nn.Linear(16, 40)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def test_swapping_keeps_names_parameters_and_the_named_layers():
    model = Blocks()
    before, keys = list(model.parameters()), list(model.state_dict())
    done = thresher.nvfp4_training(model, keep=["head", "first", "last:2"])
    assert done.swapped == ("layers.1.0",) and set(done.kept) == {
        "layers.0.0",
        "layers.2.0",
        "layers.3.0",
        "lm_head",
    }
    assert abs(done.share - 256 / (4 * 256 + 640)) < 1e-9
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)) and keys == list(
        model.state_dict()
    )
    assert type(model.layers[1][0]) is NVFP4Linear and type(model.lm_head) is nn.Linear
    twin = copy.deepcopy(model)
    assert twin.layers[1][0].recipe == PAPER
    restore(model)
    assert type(model.layers[1][0]) is nn.Linear
    x = torch.randn(3, 16)
    assert not torch.equal(model(x), twin(x))
    use_recipe(twin, EXACT)
    torch.testing.assert_close(model(x), twin(x))


def test_bad_keep():
    with pytest.raises(ArgumentError, match="list of words"):
        thresher.nvfp4_training(Blocks(), keep="head")
    with pytest.raises(ArgumentError, match=r"called like layers\.0\.0"):
        thresher.nvfp4_training(Blocks(), keep=["*.fc1"])


def test_half_precision_and_autocast():
    x, grad = torch.randn(8, 48), torch.randn(8, 32)
    layer = linear().to(torch.bfloat16)
    y, dx, dw = gradients(layer, x.bfloat16(), grad.bfloat16())
    assert y.dtype == dx.dtype == dw.dtype == torch.bfloat16
    layer = linear(recipe=TrainingRecipe(stochastic=False), bias=False)
    plain = gradients(layer, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(layer, x, grad)
    for a, b in zip(plain, cast, strict=True):
        torch.testing.assert_close(a, b)


def test_a_regression_is_learnt():
    torch.manual_seed(0)
    target = nn.Linear(32, 8, bias=False)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    thresher.nvfp4_training(model, keep=())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 32)
        loss = (model(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
