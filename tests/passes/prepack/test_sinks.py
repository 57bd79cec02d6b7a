"""Attention with sinks: a stored score of each head that takes its share of the softmax and has no value."""

import mixtures
import pytest
import torch
from torch import nn

import thresher
from thresher.graph import capture
from thresher.passes.structure.recover import recover


@torch.no_grad()
def test_gpt_oss_is_packed_with_either_padding():
    torch._dynamo.reset()
    kinds = ["full_attention", "sliding_attention"]
    model = mixtures.build("gpt_oss", num_hidden_layers=2, layer_types=kinds)
    for layer in model.model.layers:
        layer.self_attn.sinks.normal_(0, 2)
    fast = thresher.compile(model, mixtures.batch(), {"prepack": True}, target="reference")
    assert fast.report["prepack"].rewritten
    for turned in (False, True):
        given = mixtures.batch()
        given = {k: v.flip(1) if turned and k != "use_cache" else v for k, v in given.items()}
        real = given["attention_mask"].bool()
        made, want = fast(**given).logits[real], model(**given).logits[real]
        torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-4)
        for layer in model.model.layers:  # they matter, so that leaving them out would show
            layer.self_attn.sinks.neg_()
        assert (model(**given).logits[real] - want).abs().max() > 1e-2
        for layer in model.model.layers:
            layer.self_attn.sinks.neg_()


class Attends(nn.Module):
    """Attention with a column beside its scores; `fault` names what makes it no sink."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.sinks = nn.Parameter(torch.randn(4))

    def forward(self, x):
        q, k, v = (p(x).view(2, 6, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) * 8**-0.5
        column = self.sinks.reshape(1, -1, 1, 1).expand(2, 4, 6, 1)
        if self.fault == "of the query":
            column = q.sum(-1, keepdim=True)
        if self.fault == "of the row":
            column = self.sinks[:2].reshape(2, 1, 1, 1).expand(2, 4, 6, 1)
        logits = torch.cat([column, scores] if self.fault == "in front" else [scores, column], -1)
        if self.fault == "another shift":
            logits = logits - logits.max(dim=-2, keepdim=True).values
        else:
            logits = logits - logits.max(dim=-1, keepdim=True).values
        kept = logits.softmax(-1)
        kept = kept[..., 1:] if self.fault in ("in front", "cut in front") else kept[..., :-1]
        return self.o((kept @ v).transpose(1, 2).reshape(2, 6, 32))


@pytest.mark.parametrize(
    "fault", [None, "of the query", "of the row", "in front", "another shift", "cut in front"]
)
def test_only_a_stored_score_of_each_head_is_a_sink(fault):
    program = capture.from_export(
        torch.export.export(Attends(fault).eval(), (torch.randn(2, 6, 32),), strict=False)
    )
    found = recover(program)
    assert [a.sinks is not None for a in found.attentions] == ([True] if fault is None else [])
    if fault is not None:
        assert any("softmax" in m.reason or "sinks" in m.reason for m in found.missed)
