"""GPTQ: against a plain transcription of the algorithm, on hard Hessians, and on every grid."""

import dataclasses

import pytest
import torch

from thresher.errors import ArgumentError
from thresher.passes.rsq.quantizer.gptq import gptq, output_error, round_to_nearest
from thresher.passes.rsq.quantizer.grid import IntegerGrid, NVFP4Grid
from thresher.passes.rsq.quantizer.hessian import _COLUMNS as hessian_columns
from thresher.passes.rsq.quantizer.hessian import Hessian, HessianError, factor

GRIDS = [
    *(IntegerGrid(bits, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    IntegerGrid(3, 32, symmetric=False),
    IntegerGrid(4, 64),
    NVFP4Grid(),
    NVFP4Grid(search=False),
]


def _id(value):
    if isinstance(value, IntegerGrid):
        return f"int{value.bits}g{value.group}{'s' if value.symmetric else 'a'}"
    return f"nvfp4{'-search' if value.search else ''}" if isinstance(value, NVFP4Grid) else str(value)


def layer(rows=24, width=128, tokens=400, seed=0):
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=make) * torch.logspace(0, -1.5, width)[:, None]
    x = torch.randn(tokens, width, generator=make) @ mix
    return torch.randn(rows, width, generator=make) * 0.05, x


def hessian(x, weights=None):
    h = Hessian.empty(x.shape[-1])
    h.add(x, weights)
    return h.matrix()


def textbook(weight, h, grid, damping=0.01, order=None):
    """GPTQ as published: invert the Hessian, factor the inverse, one column and one full update at a time."""
    w, width = weight.double().clone(), weight.shape[1]
    order = torch.arange(width) if order is None else order
    w, h = w[:, order], h[order][:, order].clone()
    h += torch.eye(width, dtype=h.dtype) * damping * torch.diagonal(h).mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    group = width if grid.group < 0 else grid.group
    bound = grid.bind(weight)
    values = torch.empty_like(w)
    static = [bound.fit(weight[:, g : g + group].float()) for g in range(0, width, group)]
    for j in range(width):
        if not torch.equal(order, torch.arange(width)) or grid.group < 0:
            parameters = static[int(order[j]) // group]
        elif j % group == 0:
            parameters = bound.fit(w[:, j : j + group].float())
        values[:, j] = bound.decode(bound.encode(w[:, j].float(), parameters), parameters).double()
        error = (w[:, j] - values[:, j]) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return values[:, torch.argsort(order)]


@pytest.mark.parametrize("grid", GRIDS, ids=_id)
@pytest.mark.parametrize("activation_order", [False, True], ids=["natural", "activation"])
def test_matches_the_textbook(grid, activation_order):
    weight, x = layer()
    h = hessian(x)
    factored = factor(h, activation_order=activation_order)
    actual = gptq(weight, factored, grid)
    expected = textbook(weight, h, grid, order=factored.order)
    # A value on a rounding boundary may fall either way in fp32; all others must be the same.
    same = (actual.values.double() - expected).abs() < 1e-5
    assert same.double().mean() > 0.99
    errors = output_error(weight, actual.values, h), output_error(weight, expected, h)
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("grid", GRIDS, ids=_id)
def test_codes_and_parameters_give_the_values(grid):
    weight, x = layer()
    for result in (gptq(weight, factor(hessian(x)), grid), round_to_nearest(weight, grid)):
        assert result.codes.dtype == torch.uint8 and result.codes.shape == weight.shape
        width = weight.shape[1]
        spread = [p.repeat_interleave(width // p.shape[1], dim=1) for p in result.parameters]
        again = result.grid.decode(result.codes.float(), type(result.grid.fit(weight[:, :16]))(spread))
        assert torch.equal(again, result.values)


@pytest.mark.parametrize("grid", GRIDS, ids=_id)
def test_beats_rounding_to_nearest_by_the_measure_it_minimises(grid):
    weight, x = layer(rows=48)
    h = hessian(x)
    nearest = output_error(weight, round_to_nearest(weight, grid).values, h)
    assert output_error(weight, gptq(weight, factor(h), grid).values, h) < 0.75 * nearest


@pytest.mark.parametrize("block, width", [(32, 128), (128, 96), (128, 224), (16, 100), (128, 1), (128, 17)])
def test_block_size_does_not_change_the_result(block, width):
    weight, x = layer(width=width)
    factored = factor(hessian(x))
    grid = IntegerGrid(4, 32) if width % 32 == 0 else IntegerGrid(4)
    one = gptq(weight, factored, grid, block=block)
    whole = gptq(weight, factored, grid, block=1024)
    assert (one.codes != whole.codes).double().mean() < 0.01


def test_stacked_weights_quantise_as_each_alone():
    first, x = layer(seed=1)
    second, _ = layer(rows=8, seed=2)
    factored = factor(hessian(x))
    both = gptq(torch.cat([first, second]), factored, IntegerGrid(3))
    assert torch.equal(both.codes[:24], gptq(first, factored, IntegerGrid(3)).codes)


def test_equal_weights_are_plain_gptq_bit_for_bit():
    _, x = layer()
    plain, weighted = hessian(x), hessian(x, torch.ones(len(x)))
    assert torch.equal(plain, weighted)


def test_hessian_is_the_weighted_second_moment_and_ignores_pads():
    _, x = layer(width=40, tokens=60)
    x = x.reshape(3, 20, 40)
    weights = torch.rand(3, 20)
    weights[0, :5] = 0
    x[0, :5] = float("nan")
    h = Hessian.empty(40)
    for row in range(3):
        h.add(x[row : row + 1], weights[row : row + 1])
    kept = weights > 0
    rows = x[kept].double()
    expected = 2 / 55 * (rows * weights[kept].double()[:, None]).t() @ rows
    assert h.tokens == 55
    torch.testing.assert_close(h.matrix(), expected, rtol=1e-5, atol=1e-5)


def test_the_whole_sum_is_symmetric_whatever_is_computed_at_a_time():
    x = torch.randn(30, 2 * hessian_columns + 60)
    h = Hessian.empty(x.shape[1])
    h.add(x)
    torch.testing.assert_close(h.whole(), x.t() @ x, rtol=1e-5, atol=1e-4)


def test_hessian_in_stripes_and_resumed_is_the_same(monkeypatch):
    _, x = layer(width=100)
    whole = hessian(x)
    for name in ("_STRIPE", "_COLUMNS"):
        monkeypatch.setattr(f"thresher.passes.rsq.quantizer.hessian.{name}", 32)
    h = Hessian.empty(100)
    h.add(x[:150])
    resumed = Hessian(h.total.clone(), h.tokens)
    resumed.add(x[150:])
    torch.testing.assert_close(resumed.matrix(), whole, rtol=1e-5, atol=1e-4)


def test_a_layer_that_never_saw_a_token_is_refused():
    with pytest.raises(HessianError, match="No calibration token"):
        Hessian.empty(8).matrix()


def test_dead_columns_become_zero_and_are_reported():
    weight, x = layer(width=64)
    x[:, [3, 40]] = 0
    factored = factor(hessian(x))
    assert factored.dead.nonzero().flatten().tolist() == [3, 40]
    for grid in (IntegerGrid(3), IntegerGrid(4, 32, symmetric=False), NVFP4Grid()):
        assert (gptq(weight, factored, grid).values[:, [3, 40]] == 0).all()


@pytest.mark.parametrize("activation_order", [False, True])
def test_fewer_tokens_than_columns_still_factor(activation_order):
    weight, x = layer(width=128, tokens=5)
    h = hessian(x)
    factored = factor(h, activation_order=activation_order)
    result = gptq(weight, factored, IntegerGrid(4))
    assert result.values.isfinite().all()
    assert output_error(weight, result.values, h) < output_error(
        weight, round_to_nearest(weight, IntegerGrid(4)).values, h
    )


def test_damping_is_raised_from_the_original_hessian():
    # Eigenvalues 2.05 and -0.05: mean diagonal 1, so 0.01 fails and 0.1 succeeds.
    h = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    factored = factor(h)
    assert factored.raised == 1 and factored.damping == pytest.approx(0.1)
    expected = torch.linalg.inv(h + 0.1 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close((factored.upper.t() @ factored.upper).double(), expected, rtol=1e-4, atol=1e-4)


def test_hopeless_hessians_are_refused_with_the_reason():
    with pytest.raises(HessianError, match="not positive definite even with 1"):
        factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]], dtype=torch.float64))
    with pytest.raises(HessianError, match="NaN or inf"):
        factor(torch.tensor([[1.0, float("nan")], [0.0, 1.0]], dtype=torch.float64))


def test_activation_order_starts_with_the_largest_diagonal():
    _, x = layer(width=32)
    h = hessian(x)
    order = factor(h, activation_order=True).order
    assert (torch.diagonal(h)[order].diff() <= 0).all()
    assert factor(h).order is None


def test_all_zero_weight_stays_zero():
    _, x = layer(width=64)
    for grid in GRIDS:
        assert (gptq(torch.zeros(4, 64), factor(hessian(x)), grid).values == 0).all()


@pytest.mark.parametrize(
    "weight, grid, argument",
    [
        (torch.full((2, 64), float("nan")), IntegerGrid(4), "weight"),
        (torch.ones(64), IntegerGrid(4), "weight"),
        (torch.ones(2, 96), IntegerGrid(4, 64), "group"),
        (torch.ones(2, 40), NVFP4Grid(), "group"),
    ],
)
def test_bad_weights_are_named(weight, grid, argument):
    with pytest.raises(ArgumentError) as caught:
        round_to_nearest(weight, grid)
    assert caught.value.argument == argument


def test_a_factor_of_another_layer_is_refused():
    weight, x = layer(width=64)
    with pytest.raises(ArgumentError, match="factored"):
        gptq(weight, factor(hessian(x[:, :32])), IntegerGrid(4))
    with pytest.raises(ArgumentError, match="block"):
        gptq(weight, factor(hessian(x)), IntegerGrid(4, 64), block=32)


@pytest.mark.parametrize("field, value", [("bits", 5), ("bits", 1), ("group", 48), ("group", 0)])
def test_integer_grid_refuses(field, value):
    with pytest.raises(ArgumentError, match=field):
        dataclasses.replace(IntegerGrid(4), **{field: value})


def test_clip_search_never_loses_by_its_own_norm():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) ** 3
    for symmetric in (True, False):
        found = IntegerGrid(3, symmetric=symmetric)
        plain = dataclasses.replace(found, search=False)
        errors = [(round_to_nearest(weight, g).values - weight).abs().pow(2.5).sum(1) for g in (found, plain)]
        assert (errors[0] <= errors[1]).all() and errors[0].sum() < 0.9 * errors[1].sum()


def test_scales_are_representable_in_the_dtype_they_are_stored_in():
    weight, _ = layer()
    result = round_to_nearest(weight, IntegerGrid(4, 64, scale_dtype=torch.bfloat16))
    scale = result.parameters[0]
    assert torch.equal(scale, scale.bfloat16().float())


def test_nvfp4_encodes_as_the_format_does():
    from thresher.formats import nvfp4 as nvfp4_format

    grid = NVFP4Grid(tensor_scale=1.0)
    one = type(grid.fit(torch.ones(1, 16)))((torch.ones(1),))
    values = torch.cat([torch.linspace(-7, 7, 2801), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    codes = grid.encode(values, one)
    expected = nvfp4_format.decode_e2m1(nvfp4_format.encode_e2m1(values))
    assert torch.equal(grid.decode(codes, one), expected.float())


def test_nvfp4_scales_are_e4m3_times_one_tensor_scale():
    weight, x = layer()
    result = gptq(weight, factor(hessian(x)), NVFP4Grid())
    stored = result.grid.stored_scales(result.parameters[0])
    assert stored.dtype == torch.float8_e4m3fn
    assert torch.equal(stored.float() * result.grid.tensor_scale, result.parameters[0])
