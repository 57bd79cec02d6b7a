"""Small modules with an MLP whose hidden values are often zero, and how DEFT's tests compile them."""

import torch
from torch import nn
from torch.nn import functional as F

import thresher
from thresher.kernels import catalog
from thresher.passes import catalog as passes

catalog.load()
passes.load()
ALL = {"min_bytes": 0}
DOWN, MLP = torch.ops.thresher.sparse_down.default, torch.ops.thresher.sparse_mlp.default


class Feed(nn.Module):
    """Two MLPs with a residual and a head; `act`, `gated`, `fused` and biases as asked."""

    def __init__(self, act=F.relu, gated=False, fused=False, bias=True, width=32, neurons=96, up_act=None):
        super().__init__()
        self.act, self.gated, self.fused, self.up_act = act, gated, fused, up_act
        self.norm = nn.LayerNorm(width)
        make = 2 * neurons if fused else neurons
        self.up = nn.ModuleList(nn.Linear(width, make, bias=bias) for _ in range(2))
        self.gate = nn.ModuleList(
            nn.Linear(width, neurons, bias=bias) for _ in range(2 if gated and not fused else 0)
        )
        self.down = nn.ModuleList(nn.Linear(neurons, width, bias=bias) for _ in range(2))

    def hidden(self, i, x):
        if not self.gated:
            return self.act(self.up[i](x))
        gate, up = self.up[i](x).chunk(2, -1) if self.fused else (self.gate[i](x), self.up[i](x))
        return self.act(gate) * (self.up_act(up) if self.up_act else up)

    def forward(self, x):
        for i in range(2):
            x = x + self.down[i](self.hidden(i, self.norm(x)))
        return x


def build(model, tokens=3, width=32):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval(), torch.randn(1, tokens, width)


def compiled(model, x, **options):
    torch._dynamo.reset()
    inputs = x if isinstance(x, dict) else (x,)
    return thresher.compile(
        model, inputs, deft={**ALL, **options.pop("deft", {})}, target="reference", **options
    )


def targets(done):
    (session,) = done.sessions
    return [n.target for n in session.program.graph.nodes if n.target in (DOWN, MLP)]
