"""Products by experts: what no generic test of operators shows."""

import pytest
import torch

from thresher import ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog

catalog.load()


@pytest.mark.parametrize("name", ["nvfp4_expert_linear", "wna16_expert_linear"])
def test_a_call_for_each_expert_agrees_with_the_reference(name):
    op = ops.get(name)
    each = next(p for p in op.providers if p.name == "each_expert")
    for sample in op.inputs(torch.device("cpu"), torch.float32):
        got, want = each.run(*sample.args), op.reference(*sample.args)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=sample.label)


def test_experts_out_of_range_are_refused():
    x, w = torch.randn(3, 4), torch.randn(2, 5, 4)
    with pytest.raises(ArgumentError, match="experts"):
        torch.ops.thresher.expert_linear(x, w, torch.tensor([0, 1, 2]))
    with pytest.raises(ArgumentError, match="experts"):
        torch.ops.thresher.expert_linear(x, w, torch.tensor([0, 1]))


def test_only_experts_with_rows_are_read():
    x, w = torch.randn(3, 4), torch.randn(3, 5, 4)
    w[1] = torch.nan
    got = torch.ops.thresher.expert_linear(x, w, torch.tensor([2, 0, 2]))
    torch.testing.assert_close(got, torch.stack([w[2] @ x[0], w[0] @ x[1], w[2] @ x[2]]))
