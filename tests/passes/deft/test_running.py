"""What DEFT rewrote, when it runs: weights that change, activations of every kind, counts, and the approximate mode."""

import pytest
import torch
import zoo
from feed_forward import ALL, DOWN, Feed, build, compiled, targets
from torch import nn

import thresher
from thresher import site_counts
from thresher.errors import ArgumentError, ThresherError
from thresher.kernels import native

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="needs a C++ compiler")


@needs_native
@pytest.mark.parametrize("gated", [False, True])
def test_nan_and_inf_activations_propagate(gated):
    model, x = build(Feed(gated=gated))
    done = compiled(model, x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        given = x.clone()
        given[0, 1, 3] = bad
        expected, found = model(given), done(given)
        assert not expected[0, 1].isfinite().any()
        assert torch.equal(expected.isfinite(), found.isfinite())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "how", ["in place", "new storage", "load_state_dict", "assigned", "another parameter"]
)
def test_weights_updated_after_compiling_are_repacked(gated, how):
    model, x = build(Feed(gated=gated))
    done = compiled(model, x)
    other = {k: 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()}
    with torch.no_grad():
        if how == "in place":
            for p in model.parameters():
                p.mul_(1.5)
        elif how == "new storage":
            for p in model.parameters():
                p.data = p.data * 1.5
        elif how == "load_state_dict":
            model.load_state_dict(other)
        elif how == "assigned":
            model.load_state_dict({k: v for k, v in other.items()}, assign=True)
        else:
            model.down[0].weight = nn.Parameter(torch.randn_like(model.down[0].weight))
    torch.testing.assert_close(done(x), model(x))


def test_a_weight_that_turns_infinite_after_compiling_is_an_error():
    model, x = build(Feed())
    done = compiled(model, x)
    with torch.no_grad():
        model.down[0].weight[0, 5] = float("inf")
    with pytest.raises(ThresherError, match=r"down\.0\.weight changed .* not finite for neuron 5"):
        done(x)


def test_a_conv1d_and_a_strided_weight_are_not_copied():
    model, x = build(Feed())
    with torch.no_grad():
        for down in model.down:
            down.weight = nn.Parameter(down.weight.t().contiguous().t())
    done = compiled(model, x)
    (session,) = done.sessions
    packed = [w for w in session.program.weights.values() if w.fqn.endswith("neuron_major")]
    assert {w.tensor.data_ptr() for w in packed} == {d.weight.data_ptr() for d in model.down}
    torch.testing.assert_close(done(x), model(x))


def test_training_is_not_rewritten():
    model, x = build(Feed())
    with pytest.raises(ArgumentError, match="training mode"):
        compiled(model.train(), x)


def test_dynamic_sizes():
    model, _ = build(Feed())
    torch._dynamo.reset()
    done = torch.compile(
        model, backend="thresher", dynamic=True, options={"deft": ALL, "target": "reference"}
    )
    with torch.no_grad():
        for shape in ((2, 3, 32), (5, 7, 32), (9, 20, 32)):
            given = torch.randn(shape)
            torch.testing.assert_close(done(given), model(given))


def test_calls_are_counted_by_site_and_stand_in_the_report():
    model, x = build(Feed())
    site_counts.reset()
    done = compiled(model, x)
    before = done.report["deft"].activity
    for _ in range(4):
        done(x)
    after = done.report["deft"].activity
    assert set(after) == set(done.report["deft"].rewritten) and len(after) == 2
    if native.unavailable() is None:
        for site, found in after.items():
            calls = found["sparse"] + found["dense"]
            assert calls - before[site]["sparse"] - before[site]["dense"] == 4
    assert "activity" in done.report.to_dict()["passes"][0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_low_bit_weights_stay_within_the_budget_and_follow_the_model(bits, gated):
    model, x = build(Feed(gated=gated, width=64, neurons=256), tokens=2, width=64)
    done = compiled(model, x, deft={"bits": bits, "budget": 0.3})
    assert targets(done) == [DOWN] * 2
    (session,) = done.sessions
    held = {w.fqn: w.tensor for w in session.program.weights.values()}
    assert held[f"down.0.weight.codes{bits}"].shape == (256, 64 if bits == 8 else 32)
    error = 0.02 if bits == 8 else 0.25
    for _ in range(2):
        expected = model(x)
        assert (done(x) - expected).norm() <= error * expected.norm()
        with torch.no_grad():
            model.down[0].weight.mul_(-1.5)


def calibrated(model, batches, tmp_path, **options):
    torch._dynamo.reset()
    stats = thresher.calibrate(model, batches, deft={**ALL, "approximate": True})
    stats.save(tmp_path / "stats.safetensors")
    return compiled(
        model, batches[0], deft={"approximate": True, **options}, stats=str(tmp_path / "stats.safetensors")
    )


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.thorough)])
def test_approximate_mode_keeps_its_error_budget(name, tmp_path):
    model, batch = zoo.ZOO[name].build()
    done = calibrated(model, [batch], tmp_path, error=0.1, budget=0.5, bmax=64)
    account = done.report["deft"]
    assert targets(done) == [DOWN] * 2 and 0 < account.error <= 0.5
    (note,) = [n for n in account.notes if "thresholds keep" in n]
    assert float(note.split("at an error of ")[1].split()[0]) <= 0.1
    (session,) = done.sessions
    limits = [w for w in session.program.weights.values() if w.fqn.endswith(".threshold")]
    for w in limits:  # t / ||W2 row||
        fqn = w.fqn.removesuffix(".weight.threshold")
        norms = model.get_submodule(fqn).weight.float().norm(dim=0)
        torch.testing.assert_close(w.tensor * norms, (w.tensor * norms)[:1].expand_as(norms))
    with torch.no_grad(), pytest.raises(thresher.ThresherError, match="Compile the model again"):
        model.get_submodule(fqn).weight.mul_(2)
        done(**batch)


def test_approximate_mode_without_calibration_says_so():
    model, batch = zoo.ZOO["bert"].build()
    torch._dynamo.reset()
    found = thresher.explain(model, batch, deft={**ALL, "approximate": True}).report["deft"]
    assert not found.rewritten and all("needs calibration" in m.reason for m in found.missed)


def test_thresholds_of_another_checkpoint_are_refused(tmp_path):
    model, batch = zoo.ZOO["bert"].build()
    calibrated(model, [batch], tmp_path, error=0.1, budget=0.5)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(1.1)
    with pytest.raises(ThresherError, match="measured on weights"):
        compiled(model, batch, deft={"approximate": True}, stats=str(tmp_path / "stats.safetensors"))


def test_the_greedy_choice_spends_where_a_byte_costs_least():
    from thresher.passes.deft.thresholds import KEPT, Curve, choose

    cheap = Curve(KEPT, KEPT, tuple(0.01 * (1 - k) for k in KEPT), 1000)
    dear = Curve(KEPT, KEPT, tuple(1 - k for k in KEPT), 1000)
    chosen = choose({"cheap": cheap, "dear": dear}, 0.05)
    assert chosen["cheap"].density == KEPT[-1] and chosen["dear"].density > 0.8
    large = Curve(KEPT, KEPT, dear.errors, 100_000)
    chosen = choose({"large": large, "small": dear}, 0.3)
    assert chosen["large"].density < chosen["small"].density
