"""Scores of models that fold the scale of attention into their queries and keys."""

import pytest
import torch
from factored import factored
from pruned import pruned
from tiny_llama import IMAGE, make, prompt

OPTIONS = dict(image_token_id=IMAGE, min_image_tokens=8, bucket=1, min_saving=0.0)

CASES = {
    "the question": dict(policy="iga"),
    "the layer before": dict(policy="fastv"),
    "what is reserved": dict(policy="uniform", reserve=0.5, reserve_by="attention"),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_factors_count_once(case):
    model = make(initializer_range=0.4)  # attention sharp enough that its order depends on the scale
    options = dict(OPTIONS, stages=((1, 0.5),), **CASES[case])
    expected, actual = (pruned(m, dict(input_ids=prompt()), options)[1] for m in (model, factored(model)))
    assert torch.equal(actual["kept.1"], expected["kept.1"])
