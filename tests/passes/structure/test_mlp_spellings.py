"""Activations that a model spells out are known by their expression."""

import math

import pytest
import torch
from torch import nn

from thresher.graph import capture
from thresher.passes.structure.recover import recover

SPELLED = {
    "divided, as in ESM": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "multiplied": lambda x: 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5))),
    "another divisor": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(3.0))),
    "another half": lambda x: x * 0.6 * (1.0 + torch.erf(x / math.sqrt(2.0))),
}


class Mlp(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act, self.up, self.down = act, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


@pytest.mark.parametrize("name", SPELLED)
def test_gelu_by_erf(name):
    exported = torch.export.export(Mlp(SPELLED[name]).eval(), (torch.randn(2, 3, 8),), strict=False)
    found = [m.activation for m in recover(capture.from_export(exported)).mlps]
    assert found == ([] if "another" in name else ["gelu"])
