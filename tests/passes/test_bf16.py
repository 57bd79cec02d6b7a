"""Linears in bfloat16: those that no other pass took, from weights that follow the model's."""

import leniently
import pytest
import torch
import zoo

import thresher
from thresher.errors import NothingRewrittenError
from thresher.passes import bf16

OPTIONS = {"min_weights": 0, "emulate": True}


def compiled(recipe, name="llama"):
    torch._dynamo.reset()
    model, inputs = zoo.ZOO[name].build()
    return model, inputs, thresher.compile(model, inputs, recipe, target="reference")


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # weights [out, in] and, with biases, [in, out]
def test_every_linear_multiplies_in_bf16(name):
    model, inputs, fast = compiled({"bf16": OPTIONS}, name)
    report = fast.report["bf16"]
    assert len(report.rewritten) > 7 and not report.missed and 1e-5 < report.error < 0.05
    program = fast.sessions[-1].program
    products = program.nodes(torch.ops.aten.linear.default)
    assert {n.meta["val"].dtype for n in products} == {torch.bfloat16} and len(products) == len(
        report.rewritten
    )
    before = fast(**inputs).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = fast(**inputs).logits
    assert fast.counters[-1].repacked and not torch.equal(before, after)
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    assert (after[real] - expected).abs().max() < 0.05 * expected.abs().max()


def test_it_takes_what_other_passes_left_and_keeps_what_it_is_told_to():
    _, _, fast = compiled({"nvfp4": {"min_weights": 1500}, "bf16": {**OPTIONS, "keep": ["head"]}})
    reasons = {m.site: m.reason for m in fast.report["bf16"].missed}
    assert "keep='head'" in reasons["lm_head"]
    taken = set(fast.report["nvfp4"].rewritten)
    assert taken and not taken & set(fast.report["bf16"].rewritten) and fast.report["bf16"].rewritten


def test_a_processor_without_instructions_is_left_alone(monkeypatch):
    monkeypatch.setattr(bf16, "no_instructions", lambda device: "This processor multiplies no bfloat16.")
    recipe = {"bf16": {"min_weights": 0}}
    with pytest.raises(NothingRewrittenError, match="bf16: This processor multiplies no bfloat16"):
        compiled(recipe)
    torch._dynamo.reset()
    model, inputs = zoo.ZOO["llama"].build()
    fast = leniently.compile(model, inputs, recipe)
    assert not fast.report["bf16"].rewritten
    assert {m.reason for m in fast.report["bf16"].missed} == {"This processor multiplies no bfloat16."}
