"""Calibration through the public way in: taps see real data of every batch, statistics name their model."""

import pickle
from dataclasses import dataclass

import pytest
import torch
import zoo

import thresher
from thresher.errors import ArgumentError, ThresherError
from thresher.passes import base
from thresher.passes.calibrate import Statistics, Tap
from thresher.recipe import CONFIGS, PassConfig


class CountReal:
    def __init__(self):
        self.tokens, self.total = 0, torch.zeros(())

    def add(self, value, real):
        real = torch.ones(value.shape[:2], dtype=torch.bool) if real is None else real
        self.tokens += int(real.sum())
        self.total = self.total + value[real].abs().sum()

    def result(self):
        return {"tokens": torch.tensor(self.tokens), "total": self.total}


@dataclass(frozen=True)
class LookConfig(PassConfig):
    name = "look"


class Look(base.Pass[LookConfig]):
    name = "look"

    def taps(self, program, context):
        return [Tap(m.fqn, m.hidden, CountReal) for m in context.structure().mlps]

    def match(self, program, context):
        return [
            base.Miss(site, f"It saw {int(v['tokens'])} tokens.") for site, v in context.stats["look"].items()
        ]

    def rewrite(self, program, match, context):
        raise AssertionError("nothing matches")


@pytest.fixture(autouse=True)
def look():
    base.register_pass(Look)
    yield
    del base.PASSES["look"], CONFIGS["look"]


def batches(vocabulary):
    make = torch.Generator().manual_seed(0)
    for rows, width in ((2, 7), (3, 11), (2, 5)):
        mask = torch.ones(rows, width, dtype=torch.int64)
        mask[0, 3:] = 0
        yield {"input_ids": torch.randint(vocabulary, (rows, width), generator=make), "attention_mask": mask}


def test_every_batch_is_seen_without_its_pads_and_statistics_survive_a_file(tmp_path):
    model, _ = zoo.ZOO["llama"].build()
    given = list(batches(model.config.vocab_size))
    stats = thresher.calibrate(model, given, look=True)
    sites = stats["look"]
    assert len(sites) == model.config.num_hidden_layers
    real = sum(int(b["attention_mask"].sum()) for b in given)
    assert {int(s["tokens"]) for s in sites.values()} == {real}
    assert all(s["total"] > 0 for s in sites.values())
    stats.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert again.fingerprint == stats.fingerprint and set(again["look"]) == set(sites)
    found = thresher.explain(model, given[0], look=True, stats=str(tmp_path / "s.safetensors"))
    assert {m.reason for m in found.report["look"].missed} == {f"It saw {real} tokens."}


def test_statistics_of_another_model_are_refused(tmp_path):
    model, _ = zoo.ZOO["llama"].build()
    given = list(batches(model.config.vocab_size))
    thresher.calibrate(model, given, look=True).save(tmp_path / "s.safetensors")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    found = thresher.explain(model, given[0], look=True, stats=str(tmp_path / "s.safetensors"))
    assert "measured on weights" in found.refused[0]


def test_what_cannot_be_calibrated_says_so(tmp_path):
    model, _ = zoo.ZOO["llama"].build()
    with pytest.raises(ThresherError, match="No pass of this recipe needs data"):
        thresher.calibrate(model, batches(model.config.vocab_size), prepack=True)
    with pytest.raises(ThresherError, match="not a single batch"):
        thresher.calibrate(model, [], look=True)
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(ArgumentError, match="stats"):
        Statistics.load(tmp_path / "x")


def test_what_cannot_be_merged_over_ranks_says_so(monkeypatch):
    """Two ranks with the same collectors; `CountReal` has no `merge`."""
    import torch.distributed as dist

    def both(found, mine, group):
        found[:] = [mine, pickle.loads(pickle.dumps(mine))]

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather_object", both)
    model, _ = zoo.ZOO["llama"].build()
    with pytest.raises(ThresherError, match=r"What look gathers at .* cannot be merged"):
        thresher.calibrate(model, batches(model.config.vocab_size), look=True, group=object())
