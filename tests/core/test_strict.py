"""`thresher.compile` raises where nothing asked for could be done; switches, the log, and warnings that appear once."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch

import thresher
from thresher import notices
from thresher.errors import ArgumentError, NothingRewrittenError, ThresherError
from thresher.testing import tiny_model


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rsq": {"bits": 4}}, r"rsq: It needs calibration"),
        ({"prepack": {"mask": "no_such_input"}}, r"prepack: .*no_such_input"),
        ({"nvfp4": {"min_weights": 0, "budget": 1e-9}}, r"nvfp4: It was rolled back: .*budget"),
        ({"nvfp4": True, "bf16": {"min_weights": 1 << 40}}, r"nvfp4: .* bf16: "),
        ({"zipvl": {"keep": 0.5}}, r"zipvl: "),
    ],
)
def test_nothing_done_raises_with_the_passes_own_reasons(options, said):
    model, batch = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NothingRewrittenError, match=said):
            thresher.compile(model, batch, options, target="reference")
    with pytest.warns(thresher.ThresherWarning, match=said), torch.no_grad():
        torch.compile(model, backend="thresher", options={**options, "target": "reference"})(**batch)


def test_a_model_in_several_graphs_is_said_to_be():
    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            if self.first(x).sum() > 0:  # Python decides on data, as dynamic rotary positions do
                x = x * 2
            return self.second(x)

    with pytest.raises(
        NothingRewrittenError,
        match=r"None of 2 graphs, each looked at alone.*cut the model into 2 graphs.*TORCH_LOGS",
    ):
        thresher.compile(Cut().eval(), (torch.randn(3, 8),), prepack=True, target="reference")


def test_what_asks_for_nothing_or_is_done_in_part_is_compiled():
    model, batch = tiny_model()
    for recipe in ("none", {"prepack": True, "fuel": 0}, {"prepack": True, "rsq": True}):
        assert thresher.compile(model, batch, recipe, target="reference").sessions


def test_keep_that_names_nothing():
    model, batch = tiny_model()
    ids = batch["input_ids"]
    for keep, meant in (("haed", "Did you mean 'head'"), ("layers.0.q*.x", "Did you mean 'layers.0.q'")):
        given = {"nvfp4": {"min_weights": 0, "keep": ["first", keep]}}
        with pytest.raises(ArgumentError, match=f"nvfp4 option keep: got {keep!r}.*{meant}".replace("*", r"\*", 1)
                           if "*" in keep else f"nvfp4 option keep: got {keep!r}.*{meant}"):  # fmt: skip
            thresher.compile(model, batch, given, target="reference")
        with pytest.raises(ArgumentError, match=r"rsq option keep"):
            thresher.quantize(model, [batch], thresher.RSQ(keep=("head", keep)))
    assert ids is batch["input_ids"]


class TestSwitches:
    def test_disabled_runs_the_model_as_it_was(self, monkeypatch):
        model, batch = tiny_model()
        monkeypatch.setenv("THRESHER_DISABLE", "1")
        fast = thresher.compile(model, batch, "exact")
        with torch.no_grad():
            expected = model(**batch)
            assert torch.equal(fast(**batch), expected) and not fast.sessions
            assert torch.equal(torch.compile(model, backend="thresher")(**batch), expected)
        with pytest.raises(ThresherError, match="THRESHER_DISABLE"):
            fast.report  # noqa: B018
        monkeypatch.setenv("THRESHER_DISABLE", "0")
        assert thresher.compile(model, batch, "exact", target="reference").report.rewritten

    def test_logs_go_to_stderr_where_asked_for(self):
        code = (
            "import torch, thresher\nfrom thresher.testing import tiny_model\nm, b = tiny_model()\n"
            "thresher.compile(m, b, 'exact', target='reference')\n"
        )
        env = {**os.environ, "THRESHER_LOGS": "info"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert "thresher INFO: graph 0/0 on input_ids [3, 11], attention_mask [3, 11]: thresher: prepack" in (
            done.stderr.replace("decode_attention rewrote 0 of 0 sites; ", "")
        )

    def test_a_level_that_is_none_is_said(self, monkeypatch):
        monkeypatch.setenv("THRESHER_LOGS", "loud")
        with pytest.warns(thresher.ThresherWarning, match="none of debug, info"):
            notices._set_up()


class TestWarnings:
    def test_one_names_the_graph_and_appears_once_a_model(self, caplog):
        model, batch = tiny_model()
        fast = torch.compile(
            model, backend="thresher", dynamic=False, options={"rsq": True, "target": "reference"}
        )
        with (
            warnings.catch_warnings(record=True) as caught,
            caplog.at_level(logging.WARNING, logger="thresher"),
        ):
            warnings.simplefilter("always")
            with torch.no_grad():
                for rows in (3, 2):
                    fast(**{k: v[:rows] for k, v in batch.items()})
        said = [str(w.message) for w in caught if w.category is thresher.ThresherWarning]
        assert len(said) == 1 and "graph 0/0 on input_ids [3, 11], attention_mask [3, 11]" in said[0]
        assert [r.getMessage() for r in caplog.records if r.name == "thresher"] == said

    def test_another_model_is_told_of_again(self):
        for _ in range(2):
            model, batch = tiny_model()
            with pytest.warns(thresher.ThresherWarning, match="It needs calibration"), torch.no_grad():
                torch.compile(model, backend="thresher", options={"rsq": True, "target": "reference"})(
                    **batch
                )
            torch._dynamo.reset()
