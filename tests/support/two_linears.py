"""Two linears with a ReLU between them, and a model's graph as lowering rewrites it."""

import torch
from torch import nn


class Two(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def graph_of(model, x):
    return torch.export.export(model, (x,), strict=False).run_decompositions({}).graph
