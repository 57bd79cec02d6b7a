"""Masks that are only causal become `is_causal`; every other mask stays, with its reason."""

import leniently
import pytest
import torch
import zoo
from sampled import sampled

from thresher.passes.structure.sdpa import attention

aten = torch.ops.aten


def _compiled(model, inputs, dynamic=False):
    torch._dynamo.reset()
    return leniently.compile(model, inputs, dynamic=dynamic, causal_mask=True)


def _prompt(name, **drop):
    model, inputs = zoo.ZOO[name].build()
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    return model, inputs


@pytest.mark.parametrize(
    "dynamic, cache", sampled([(False, False), (True, True)], [False, True], [False, True])
)
def test_a_mask_that_sizes_decide_goes(dynamic, cache):
    model, inputs = _prompt("llama")
    expected = model(**inputs, use_cache=cache).logits
    compiled = _compiled(model, {**inputs, "use_cache": cache}, dynamic)
    report = compiled.report["causal_mask"]
    nodes = compiled.sessions[-1].program.nodes(aten.scaled_dot_product_attention.default)
    if report.rewritten:
        assert len(report.rewritten) == 2 and report.error < 1e-5
    assert nodes and all(attention(n).causal and attention(n).mask is None for n in nodes)
    torch.testing.assert_close(compiled(**inputs, use_cache=cache).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_padding_mask_stays():
    model, inputs = zoo.ZOO["llama"].build()
    report = _compiled(model, inputs).report["causal_mask"]
    assert not report.rewritten
    assert all("attention_mask" in miss.reason for miss in report.missed) and len(report.missed) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_window_stays(dynamic):
    model, inputs = _prompt("mistral")
    report = _compiled(model, {**inputs, "use_cache": False}, dynamic).report["causal_mask"]
    assert not report.rewritten
    assert all("window of 8" in miss.reason for miss in report.missed)


def test_gapped_positions_stay():
    """transformers reads a gap as the start of another sequence."""
    model, inputs = _prompt("llama")
    positions = torch.arange(12).expand(3, -1).clone()
    positions[:, 6:] -= 6
    report = _compiled(model, {**inputs, "position_ids": positions, "use_cache": False}).report["causal_mask"]
    assert not report.rewritten and "position_ids" in report.missed[0].reason


def test_an_encoder_has_nothing_to_say():
    model, inputs = _prompt("modernbert")
    report = _compiled(model, inputs).report["causal_mask"]
    assert not report.rewritten
