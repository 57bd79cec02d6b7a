"""The input that marks real tokens may have any name: every reader asks the program which it is."""

import pytest
import torch

import thresher
from thresher import testing
from thresher.errors import ArgumentError
from thresher.recipe import Recipe
from thresher.runtime.packing.plan import row_lengths

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


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_values_other_than_zero_and_one_mean_what_the_model_makes_of_them(dtype):
    plain, inputs = model(Pad, layers=1), renamed()
    inputs["pad"] = inputs["pad"].to(dtype)
    call = thresher.compile(plain, inputs, OPTIONS, target="reference")
    for factor in (3, -1, 0.5) if dtype.is_floating_point else (3, -1):
        strange = inputs["pad"] * factor
        with torch.no_grad():
            expected = plain(input_ids=inputs["input_ids"], pad=strange)
            actual = call(input_ids=inputs["input_ids"], pad=strange)
        torch.testing.assert_close(actual, expected)


def test_an_error_calls_the_mask_by_its_name():
    with pytest.raises(ArgumentError, match=r"^pad: got 1 values other than 0 and 1"):
        row_lengths(torch.tensor([[1, 3, 0]]), "pad")
    with pytest.raises(ArgumentError, match=r"^pad: got .* of shape"):
        row_lengths(torch.ones(2, 1, 3), "pad")


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
