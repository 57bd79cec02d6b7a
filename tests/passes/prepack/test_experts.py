"""Tokens are rows: a batch is packed through routing, whichever way the experts are computed."""

import mixtures
import pytest
import torch

import thresher


@pytest.mark.parametrize(
    "kind, experts, dynamic",
    [
        pytest.param("mixtral", None, None, marks=pytest.mark.thorough),
        ("qwen3_moe", "batched_mm", True),
        ("deepseek_v3", None, True),
        ("llama4", None, None),
    ],
)
def test_mixtures_are_packed(kind, experts, dynamic):
    torch._dynamo.reset()
    model, given = mixtures.build(kind, experts), mixtures.batch()
    fast = thresher.compile(model, given, {"prepack": True}, target="reference", dynamic=dynamic)
    assert fast.report["prepack"].rewritten
    others = (given, mixtures.batch((12, 3, 4, 6))) if dynamic else (given,)
    for one in others:
        real = one["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(
                fast(**one).logits[real], model(**one).logits[real], rtol=1e-4, atol=1e-4
            )


def test_packed_experts_are_rounded():
    torch._dynamo.reset()
    model, given = mixtures.build("mixtral"), mixtures.batch()
    recipe = {"prepack": True, "nvfp4": {"min_weights": 0, "budget": 9.0}, "min_gain": 0.0}
    report = thresher.compile(model, given, recipe, target="reference").report
    assert report["prepack"].rewritten
    assert sum("experts" in site for site in report["nvfp4"].rewritten) == 2
