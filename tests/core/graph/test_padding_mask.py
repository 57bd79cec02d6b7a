"""The input that marks real tokens may have any name: every reader asks the program which it is."""

import pytest
import torch

import thresher
from thresher import testing
from thresher.errors import ArgumentError
from thresher.recipe import Recipe

OPTIONS = {"prepack": {"mask": "pad"}}


class Pad(testing.TinyTransformer):
    def forward(self, input_ids, pad):
        return super().forward(input_ids, pad)


def renamed():
    inputs = testing.tiny_model()[1]
    return {"input_ids": inputs["input_ids"], "pad": inputs["attention_mask"]}


def model(kind, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**sizes).eval()


def test_a_program_knows_its_mask():
    program = thresher.explain(model(Pad, layers=1), renamed(), OPTIONS).before[0]
    assert program.input_names[program.placeholders.index(program.padding_mask)] == "pad"
    values = [renamed().get(n) for n in program.input_names]
    assert torch.equal(program.real_tokens(values), renamed()["pad"] == 1)
    program.mask_name = "attention_mask"
    assert program.padding_mask is None and program.real_tokens(values) is None
    assert program.copy().mask_name == "attention_mask"


@pytest.mark.parametrize(
    ("given", "name"), [(OPTIONS, "pad"), ({"prepack": True}, "attention_mask"), ({}, "attention_mask")]
)
def test_a_recipe_says_the_name(given, name):
    assert Recipe.of(given or "none").mask_name == name


def test_the_cost_model_counts_real_tokens_under_either_name():
    usual, inputs = testing.tiny_model(width=256, layers=1)
    a = thresher.compile(usual, inputs, prepack=True, target="reference")
    b = thresher.compile(model(Pad, width=256, layers=1), renamed(), OPTIONS, target="reference")
    assert a.report.predicted == pytest.approx(b.report.predicted) and a.report.predicted > 1
    assert b.report["prepack"].error == pytest.approx(a.report["prepack"].error, abs=1e-5)
    assert not any("No example was at hand" in note for note in b.report.notes)


def test_an_error_calls_the_mask_by_its_name():
    inputs = renamed()
    call = thresher.compile(model(Pad, layers=1), inputs, OPTIONS, target="reference")
    with pytest.raises(ArgumentError, match=r"^pad: got .* values other than 0 and 1"):
        call(input_ids=inputs["input_ids"], pad=inputs["pad"] * 3)


def test_calibration_leaves_out_pads_under_either_name():
    options = {"nvfp4": {"min_weights": 0, "keep": (), "sensitive": 0.1}}
    usual, inputs = testing.tiny_model(layers=1)
    inputs = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 0, 3, inputs["input_ids"])}
    a = thresher.calibrate(usual, [inputs], options | {"prepack": True})
    named = {"input_ids": inputs["input_ids"], "pad": inputs["attention_mask"]}
    b = thresher.calibrate(model(Pad, layers=1), [named], options | OPTIONS)
    wrong = thresher.calibrate(model(Pad, layers=1), [named], options | {"prepack": True})
    for site, values in a["nvfp4"].items():
        assert torch.equal(values["square_mean"], b["nvfp4"][site]["square_mean"])
    assert any(
        not torch.equal(v["square_mean"], wrong["nvfp4"][s]["square_mean"]) for s, v in a["nvfp4"].items()
    )
