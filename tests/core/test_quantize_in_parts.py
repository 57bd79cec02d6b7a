"""Quantizing a model that Dynamo cuts says into how many graphs, whatever its first graph holds."""

import pytest
import torch
from torch import nn

import thresher
from thresher.errors import ThresherError


class Cut(nn.Module):
    """Breaks the graph behind arithmetic on sizes, and once more in the middle."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        rows = x.shape[0] * x.shape[1]
        torch._dynamo.graph_break()
        x = self.up(x) * rows
        torch._dynamo.graph_break()
        return self.down(x)


def test_a_model_in_parts_is_refused_by_their_number():
    torch._dynamo.reset()
    with pytest.raises(ThresherError, match=r"captured in [23] graphs, and quantizing needs one"):
        thresher.quantize(Cut().eval(), [{"x": torch.randn(4, 6, 16)}], thresher.RSQ(bits=4, group_size=-1))
