"""Mixtures are said row by row: one operator for each product by experts, and the same numbers."""

import mixtures
import pytest
import torch

from thresher.graph import capture
from thresher.graph.routed import is_grouped
from thresher.kernels import catalog
from thresher.model_capture import shown_to

catalog.load()


def captured(model, given, dynamic=False):
    found = []

    def keep(gm, inputs):
        found.append(capture.from_dynamo(gm, inputs)[0])
        return gm.forward

    shown_to(keep, model, dynamic)(**given)
    assert len(found) == 1
    return found[0]


def products(program):
    return program.nodes(torch.ops.thresher.expert_linear.default)


@pytest.mark.parametrize(
    "kind, experts",
    [
        ("mixtral", "grouped_mm"),
        ("mixtral", "batched_mm"),
        ("gpt_oss", "grouped_mm"),
        ("deepseek_v3", "grouped_mm"),
    ],
)
def test_routing_is_undone(kind, experts):
    model, given = mixtures.build(kind, experts), mixtures.batch()
    program = captured(model, given)
    assert len(products(program)) == 2
    assert not any(is_grouped(n) for n in program.nodes())
    assert not program.nodes(torch.ops.aten.index_put.default), "nothing is sorted back"
    named = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    got = program.run(*[named[n] for n in program.input_names])
    with torch.no_grad():
        want = model(**given).logits
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


def test_half_precision_takes_torchs_own_grouped_product():
    model, given = mixtures.build("mixtral").to(torch.bfloat16), mixtures.batch()
    assert len(products(captured(model, given))) == 2


def test_sizes_may_be_symbols():
    program = captured(mixtures.build("deepseek_v3"), mixtures.batch(), dynamic=True)
    assert len(products(program)) == 2


class _Routed(torch.nn.Module):
    """A mixture by hand; `way` says how rows come back from their experts' order."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.w = torch.nn.Parameter(torch.randn(3, 8, 8))
        self.gate = torch.nn.Linear(8, 3)

    def forward(self, x):
        chosen = self.gate(x).topk(2).indices.reshape(-1)
        order = chosen.argsort(descending=self.way == "falling")
        ends = torch.histc(chosen[order].float(), 3, 0, 2).cumsum(0).int()
        rows = torch.ops.transformers.grouped_mm_fallback(x[order // 2], self.w, ends)
        if self.way == "added":
            return torch.zeros_like(x).index_add(0, order // 2, rows)
        if self.way == "inverse":
            return rows[order.argsort()].view(-1, 2, 8).sum(1)
        if self.way == "across":  # a mean over rows in the experts' order is no row's own
            return (rows - rows.mean(0))[order.argsort()]
        return rows


@pytest.mark.parametrize(
    "way, undone", [("added", 1), ("inverse", 1), ("across", 0), ("sorted", 0), ("falling", 0)]
)
def test_only_what_is_understood_is_undone(way, undone):
    import transformers.integrations.moe  # noqa: F401 (defines the operator)

    torch.manual_seed(0)
    model, x = _Routed(way).eval(), torch.randn(6, 8)
    program = captured(model, {"x": x})
    got = program.run(*[x for _ in program.placeholders])
    with torch.no_grad():
        torch.testing.assert_close(got[0], model(x), rtol=1e-5, atol=1e-5)
    assert len(products(program)) == undone
