"""What a trained model still answers behind pruning; `benchmarks/tokens.py --only tiny_vlm` asks more, of three seeds."""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="The tiny model's images are scikit-learn's digits (extra dev).")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tiny_vlm import data, measure, train

QUESTIONS = 128
ZIP = dict(measure.PROBES, keep=0.75)


@pytest.fixture(scope="module")
def model():
    return train.load(0)


def asked(model, recipe):
    return measure.accuracy(model, QUESTIONS, 0, **recipe)["t1"]


@pytest.fixture(scope="module")
def dense(model):
    right = total = 0
    for case in measure.cases(model, QUESTIONS, data.CHAIN, 0):
        with torch.no_grad():
            logits = model.decoder(inputs_embeds=case.embeds, use_cache=False).logits[:, -1]
        right, total = right + (logits.argmax(-1) == case.answer).sum().item(), total + len(case.answer)
    return right / total


@pytest.mark.slow
def test_the_policy_finds_what_the_second_look_up_needs_and_chance_does_not(model, dense):
    """A random choice that lost nothing would say that these questions tell nobody anything."""
    assert dense > 0.88
    found = {p: asked(model, measure.pruning(p, 0.25)) for p in ("transprune", "random")}
    assert found["transprune"] > dense - 0.02, found
    assert found["random"] < dense - 0.2, found


@pytest.mark.slow
@pytest.mark.skipif(
    "THRESHER_EXHAUSTIVE" not in os.environ, reason="Set THRESHER_EXHAUSTIVE for the rarer forms."
)
def test_zipvl_needs_its_text_protected(model, dense):
    """As published, the token that answers may fall out of the important ones."""
    assert asked(model, dict(zipvl=ZIP)) > dense - 0.03
    assert asked(model, dict(zipvl=dict(ZIP, mode="paper"))) < 0.5


def test_answers_need_both_look_ups():
    """The chain's answer is the digit of the colour that the first digit names."""
    scene = data.draw(8, "test", torch.Generator().manual_seed(0))
    subject = torch.arange(8)[:, None]
    digits, cells = data.answer(scene, torch.full((8, 1), data.CHAIN), subject)
    for row in range(8):
        second = int(scene.digit_of[row, row]) % data.COLOURS
        assert digits[row, 0] == scene.digit_of[row, second]
        assert cells[row, 0].tolist() == [scene.cell_of[row, row], scene.cell_of[row, second]]
