"""Following the original: what is rounded gives the original's outputs from the inputs that quantization left."""

import captures
import pytest
import torch

import thresher.backend  # noqa: F401 (defines the operators)
from thresher.errors import ArgumentError
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer.driver import quantise_program
from thresher.passes.rsq.quantizer.gptq import gptq
from thresher.passes.rsq.quantizer.grid import IntegerGrid, NVFP4Grid
from thresher.passes.rsq.quantizer.hessian import Drift, Hessian, factor
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.rounding import round_group


def inputs(width=64, tokens=600, seed=0):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=make) @ torch.randn(width, width, generator=make)
    y = x + 0.3 * torch.randn(tokens, width, generator=make) * x.std() + 0.1 * x.roll(1, 1)
    return x, y, torch.randn(24, width, generator=make), torch.rand(tokens, generator=make) + 0.1


@pytest.mark.parametrize("activation_order", [False, True])
def test_the_correction_is_the_weighted_least_squares_answer(activation_order):
    x, y, w, weights = inputs()
    hessian, drift = Hessian.empty(64), Drift.empty(64)
    for part in (slice(0, 250), slice(250, 600)):
        hessian.add(y[part], weights[part])
        drift.add(x[part], y[part], weights[part])
    factored = factor(hessian.matrix(), 1e-6, activation_order)
    found = w + w @ drift.correction(factored, hessian.tokens)
    root = weights.double().sqrt()[:, None]
    expected = torch.linalg.lstsq(y.double() * root, (x.double() * root) @ w.t().double()).solution.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "grid", [IntegerGrid(4), IntegerGrid(4, 32, symmetric=False), NVFP4Grid()], ids=["4", "g32", "nvfp4"]
)
def test_outputs_come_nearer_to_the_originals(grid):
    x, y, w, _ = inputs()
    hessian, drift = Hessian.empty(64), Drift.empty(64)
    hessian.add(y)
    drift.add(x, y)
    factored = factor(hessian.matrix())
    (plain,) = round_group([w], factored, grid, RSQConfig())
    (followed,) = round_group([w], factored, grid, RSQConfig(), drift.correction(factored, hessian.tokens))
    assert torch.equal(plain.codes, gptq(w, factored, grid).codes)
    assert torch.equal(followed.before, w), "errors are told against the weight itself"
    wanted = x @ w.t()
    errors = [float((y @ r.after.t() - wanted).square().mean()) for r in (plain, followed)]
    assert errors[1] < 0.8 * errors[0]


def test_without_drift_nothing_is_corrected_and_pads_do_not_count():
    x, _, _, _ = inputs()
    drift = Drift.empty(64)
    drift.add(x, x)
    assert not drift.total.any()
    drift.add(x + torch.nan, x, torch.zeros(len(x)))
    assert not drift.total.any()


def batches(rows=12):
    ids = torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return [
        Batch({k: v[i : i + 3] for k, v in given.items()}, None, ids[i : i + 3]) for i in range(0, rows, 3)
    ]


def codes(folder=None, **options):
    found = quantise_program(captures.of_zoo("llama"), batches(), RSQConfig(bits=3, **options), folder)
    return {site: t["codes"] for site, t in found.linears.items()}


def test_a_model_is_followed_from_its_second_group_on_and_resumes(tmp_path):
    plain, followed = codes(), codes(follow_original=0.5)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(plain[first], followed[first]), "nothing stands before it"
    assert any(not torch.equal(plain[s], followed[s]) for s in plain if "layers.1" in s)
    codes(tmp_path, follow_original=0.5)
    next(tmp_path.glob("layer-0001*")).unlink()
    again = codes(tmp_path, follow_original=0.5)
    assert all(torch.equal(again[s], followed[s]) for s in followed)


def test_the_share_is_checked():
    with pytest.raises(ArgumentError, match="follow_original"):
        RSQConfig(follow_original=1.5).validate()
