"""Models that add vision features behind their first layers (Qwen3-VL): one graph, so that a cut reaches them."""

import torch
import vlm_zoo

import thresher
from thresher import tractable
from thresher.report import Miss, PassReport, Report
from thresher.undone import FEEDING, rewrote_nothing


def test_features_are_added_as_the_model_adds_them():
    model = vlm_zoo.build("Qwen3-VL").model.language_model
    hidden, mask = torch.randn(2, 7, 32), torch.rand(2, 7) < 0.5
    features = torch.randn(int(mask.sum()), 32)
    expected = model._deepstack_process(hidden, mask, features)
    assert torch.equal(tractable.add_at(hidden, mask, features), expected)
    parts = tractable.parts_of(model)
    with tractable.tractable(parts):
        assert model._deepstack_process is tractable.add_at
        assert torch.equal(model._deepstack_process(hidden, mask, features), expected)
    assert "_deepstack_process" not in model.__dict__ and [p for p, _, _ in parts] == [model]


def test_a_cut_reaches_the_layers_behind_the_features():
    """Behind layer one of two, where features of the second are added still."""
    model = vlm_zoo.build("Qwen3-VL")
    batch = vlm_zoo.batch("Qwen3-VL", model, (1, 2))
    options = dict(min_image_tokens=2, bucket=1, min_saving=0.0, stages=((1, 0.5),))
    fast = thresher.compile(model, batch, target="reference", transprune=options)
    assert "model.language_model.layers.0" in [
        site for r in fast.reports for site in r["transprune"].rewritten
    ]
    fast.generate(**batch, max_new_tokens=1, do_sample=False)
    assert fast.last_call.kept == [[29, 53], [21, 37]]


def test_telling_which_tokens_are_an_images_is_no_rewrite_by_itself():
    feeding = Report("transprune", passes=[PassReport("transprune", rewritten=[FEEDING])])
    missed = Report(
        "transprune", passes=[PassReport("transprune", missed=[Miss("layers.0", "It cannot be cut.")])]
    )
    pruned = Report("transprune", passes=[PassReport("transprune", rewritten=["layers.0"])])
    assert rewrote_nothing([feeding, missed]) == "transprune: It cannot be cut."
    assert rewrote_nothing([feeding, pruned]) is None
