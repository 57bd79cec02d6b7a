"""Sequences that share rows of fixed capacity: exact, and what targets without ragged shapes can run."""

import masks
import numpy as np
import pytest
import torch
import zoo
from sampled import sampled

import thresher
from thresher.runtime.packing.binpack import best_capacity, pack_dataset
from thresher.runtime.packing.boundary import argument, make_plan
from thresher.runtime.packing.buckets import ladder
from thresher.runtime.packing.plan import pack, row_plan, unpack


class TestPlan:
    def test_rows_hold_whole_sequences_and_give_them_back(self):
        mask = masks.holed((5, 0, 9, 3, 12))
        bins = pack_dataset(mask.sum(1).tolist(), 12)
        plan = row_plan(mask, bins)
        x = torch.arange(1, mask.numel() + 1.0).reshape(*mask.shape, 1) * mask[..., None]
        packed = pack(x, plan)
        assert packed.shape == (len(bins), 12, 1)
        for row, members in enumerate(bins):
            wanted = torch.cat([x[m][mask[m].bool()] for m in members])
            assert torch.equal(packed[row, : len(wanted)], wanted)
            ids = [m for m in members for _ in range(int(mask[m].sum()))]
            assert plan.segments[row, : len(ids)].tolist() == ids
            assert (plan.segments[row, len(ids) :] == -1).all()
        assert torch.equal(unpack(packed, plan), x)

    def test_capacity_follows_the_cost(self):
        lengths = [100] + [10] * 30
        assert best_capacity(lengths, token_cost=1.0, pair_cost=1e3) == 100  # masked pairs dominate
        assert best_capacity(lengths, token_cost=1e6, pair_cost=0.0) >= 100
        cheap = best_capacity([60, 50, 50, 40], 1.0, 0.0)  # 200 tokens: longer rows leave less unfilled
        assert len(pack_dataset([60, 50, 50, 40], cheap)) * cheap <= 200 + 20


class TestLadder:
    @pytest.mark.parametrize("limit, count", [(8192, 12), (1000, 4), (64, 12), (1, 1)])
    def test_few_sizes_none_too_small(self, limit, count):
        bucket = ladder(limit, count)
        sizes = {bucket(t) for t in range(1, limit + 1)}
        assert len(sizes) <= count
        assert all(bucket(t) >= t for t in range(1, limit + 1))
        assert bucket(limit + 1) >= limit + 1


@pytest.mark.parametrize("name", sampled(["mistral", "bert"], ["llama", "mistral", "bert"]))
def test_rows_equal_the_padded_model(name):
    model, inputs = zoo.ZOO[name].build()
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference", prepack={"form": "rows"}, verify=False)
    for kind in (masks.right, masks.left, masks.mixed, masks.holed):
        mask = kind((5, 3, 12))
        given = zoo.tokens(mask)
        with torch.no_grad():
            expected = model(**given)[0]
        torch.testing.assert_close(
            ours(**given)[0][mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5, msg=kind.__name__
        )
    assert ours.counters[0].packed == 5


def test_the_body_runs_in_onnx_runtime(tmp_path):
    """What a rectangular target takes: packed ids and positions, segments and columns, all [rows, capacity]."""
    ort = pytest.importorskip("onnxruntime", reason="pip install 'thresher[onnx]'")
    from thresher.lowering.onnx.export import export

    model, _ = zoo.ZOO["llama"].build()
    mask = masks.mixed((5, 3, 12))
    inputs = {**zoo.tokens(mask), "use_cache": False}
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference", prepack={"form": "rows"}, verify=False)
    session = ours.sessions[0]
    layout = session.program.packing
    given = [inputs[n] for n in layout.padded.input_names]
    plan = make_plan(mask, mask.sum(1).tolist(), layout.packing)
    early = session._run_prologue(given, layout, {})
    packed = [argument(a, {"input": given, "prologue": early}, plan) for a in layout.arguments]
    export(session.program, tmp_path / "body.onnx", body_only=True)
    engine = ort.InferenceSession(str(tmp_path / "body.onnx"))
    feed = {i.name: np.asarray(t) for i, t in zip(engine.get_inputs(), packed, strict=True)}
    (logits,) = engine.run(None, feed)
    with torch.no_grad():
        expected = model(**inputs).logits
    actual = unpack(torch.from_numpy(logits), plan)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)
