"""Autocast's casts stand in the graph: it computes the same under any autocast and none."""

import captures
import pytest
import torch
import zoo
from torch import nn

import thresher
from thresher.graph import autocast

aten = torch.ops.aten


class Islands(nn.Module):
    """A linear, a region without autocast, one with another dtype, and operators of every policy."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.config = zoo.ZOO["llama"].build()[0].config

    def forward(self, x):
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            x = x + self.b(x.float())
        with torch.autocast("cpu", dtype=torch.float16):
            x = self.c(x).float()
        x = torch.cat([x, self.a(x)], -1)  # to the widest
        return torch.nn.functional.softmax(self.a(x[..., :8]), -1), torch.cumsum(self.a(x[..., :8]), -1)


def program_of(model, inputs, way):
    return captures.dynamo(model, inputs) if way == "dynamo" else captures.export(model, inputs)


@pytest.mark.parametrize("way", ["dynamo", "export"])
@pytest.mark.parametrize("outside", [None, torch.bfloat16, torch.float16])
def test_every_cast_of_every_region_is_written_down(way, outside):
    torch.manual_seed(0)
    model, inputs = Islands().eval(), {"x": torch.randn(3, 8)}
    with torch.autocast("cpu", dtype=outside, enabled=outside is not None), torch.no_grad():
        expected = model(**inputs)
        program = program_of(model, inputs, way)
    with torch.no_grad():
        alone = program.run(inputs["x"])
    for e, a in zip(expected, alone, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    halves = {torch.float16, *([outside] if outside is not None else [])}
    casts = {n.args[1] for n in program.nodes(aten.to.dtype)}
    assert halves <= casts


def test_a_value_is_cast_once_for_all_its_readers():
    model, inputs = zoo.ZOO["llama"].build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = captures.dynamo(model, inputs)
    casts = [n for n in program.nodes(aten.to.dtype) if n.args[1] == torch.bfloat16]
    assert len({n.args[0] for n in casts}) == len(casts) > 10
    for node in program.nodes(aten.linear.default, aten.scaled_dot_product_attention.default):
        tensors = [n.meta["val"] for n in node.all_input_nodes]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {node.meta["val"].dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)])
def test_a_model_under_autocast_is_packed_and_right(dtype):
    model, inputs = zoo.ZOO["llama"].build()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, mask.shape[1] // 2 :] = 0
    batch = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        expected = model(**batch).logits
        fast = thresher.compile(model, batch, "exact", target="reference")
        actual = fast(**batch).logits
    account = fast.report["prepack"]
    assert account.rewritten and account.against == "float32" and fast.counters[0].packed == 2
    assert actual.dtype == expected.dtype
    real = mask.bool()
    scale = expected.float().abs().max()
    limit = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert ((actual.float() - expected.float())[real].abs().max() / scale) < limit


def test_sessions_run_without_autocast():
    model, inputs = zoo.ZOO["llama"].build()
    program = captures.dynamo(model, inputs)
    arguments = captures.arguments(program, inputs)
    from thresher.lowering.reference import Reference
    from thresher.report import Report
    from thresher.runtime.session import Session

    session = Session(program, Reference(), Reference(), Report("none"))
    plain = session(arguments, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = session(arguments, {})
        assert autocast.ambient() == {"cpu": torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
