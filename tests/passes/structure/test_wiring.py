"""A layer that is wired wrongly is not taken for one, and the reason names what is wrong."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from thresher.graph import capture
from thresher.passes.structure.recover import recover

BATCH, TOKENS, WIDTH, HEADS, DIM, HIDDEN = 3, 6, 32, 4, 8, 48


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, measured=None, dim=-1):
        return self.weight * (
            x * torch.rsqrt((x if measured is None else measured).pow(2).mean(dim, True) + 1e-6)
        )


def rotate(x):
    first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat((-second, first), -1)


class Layer(nn.Module):
    """A pre-norm layer with rotary attention and a gated MLP; `fault` names the one thing done wrongly."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.gate = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm, self.norm2 = Norm(), Norm()

    def heads(self, projected, mixed=False):
        if mixed:  # [tokens, heads] read as [heads, tokens]
            return projected.view(BATCH, HEADS, TOKENS, DIM)
        return projected.view(BATCH, TOKENS, HEADS, DIM).transpose(1, 2)

    def rope(self, x, cos, sin, fault=None):
        if fault == "unrotated":
            return x
        if fault == "signless":
            return x * cos + torch.cat((x[..., DIM // 2 :], x[..., : DIM // 2]), -1) * sin
        if fault == "swapped":
            return x * cos + torch.cat((-x[..., : DIM // 2], x[..., DIM // 2 :]), -1) * sin
        return x * cos + rotate(x) * sin

    def attention(self, x, cos, sin):
        fault = self.fault
        q, k, v = self.heads(self.q(x), fault == "query heads"), self.heads(self.k(x)), self.heads(self.v(x))
        if fault == "scaled values":
            v = v * 2
        if fault == "added to keys":
            k = k + 1
        q = self.rope(q, cos, sin, fault)
        k = self.rope(k, *((sin, cos) if fault == "other angles" else (cos, sin)))
        if fault == "softmax over queries":
            mixed = torch.softmax(q @ k.transpose(2, 3) * DIM**-0.5, -2) @ v
        elif fault == "keys not transposed":
            mixed = torch.softmax(q @ k.reshape(BATCH, HEADS, DIM, TOKENS) * DIM**-0.5, -1) @ v
        else:
            mixed = scaled_dot_product_attention(q, k, v)
        mixed = mixed if fault == "output heads" else mixed.transpose(1, 2)
        return self.o(mixed.reshape(BATCH, TOKENS, WIDTH))

    def mlp(self, x, normed):
        fault = self.fault
        if fault == "gate reads other":
            return self.down(silu(self.gate(x)) * self.up(normed))
        if fault == "halves overlap":
            both = self.gate_up(normed)
            return self.down(silu(both[..., :HIDDEN]) * both[..., 1 : HIDDEN + 1])
        if fault == "unknown activation":
            return self.down(torch.sin(self.gate(normed)) * self.up(normed))
        if fault == "activation outside":
            return self.down(silu(self.gate(normed) * self.up(normed)))
        if fault == "widths":
            return self.down(silu(self.gate(normed)[..., :1]) * self.up(normed))
        return self.down(silu(self.gate(normed)) * self.up(normed))

    def forward(self, x, cos, sin):
        fault = self.fault
        if fault == "norm of another":
            normed = self.norm(x, measured=x + 1)
        else:
            normed = self.norm(x, dim=1 if fault == "norm over tokens" else -1)
        attended = self.attention(normed, cos, sin)
        x = attended if fault == "no residual" else attended + (x * x if fault == "other residual" else x)
        return x + self.mlp(x, self.norm2(x))


def recovered(fault=None):
    torch.manual_seed(0)
    inputs = (torch.randn(BATCH, TOKENS, WIDTH), torch.randn(TOKENS, DIM), torch.randn(TOKENS, DIM))
    return recover(capture.from_export(torch.export.export(Layer(fault).eval(), inputs, strict=False)))


def test_the_layer_without_a_fault_is_recovered():
    structure = recovered()
    (layer,) = structure.layers
    assert layer.complete and structure.missed == [] and layer.norm_position == "pre"
    assert layer.attention.rope.cos.name == "cos" and layer.attention.rope.sin.name == "sin"
    assert [e.kind for e in structure.embeddings] == ["input"]
    assert [n.name for n in layer.inputs] == ["x", "cos", "sin"]


ATTENTION = {
    "query heads": "dimension 2 runs over features, where tokens are expected",
    "output heads": "not as [batch, tokens, heads * head_dim] with the heads in order",
    "unrotated": "only one of them is rotated",
    "signless": "query does not lead back to one linear",
    "swapped": "query does not lead back to one linear",
    "other angles": "rotated by different angles",
    "scaled values": "values are scaled",
    "added to keys": "key does not lead back to one linear",
    "softmax over queries": "works along dimension -2",
    "keys not transposed": "not over products of queries and keys",
}


@pytest.mark.parametrize("fault", ATTENTION)
def test_wrong_attention(fault):
    structure = recovered(fault)
    assert structure.attentions == [] and len(structure.mlps) == 1
    assert any(ATTENTION[fault] in m.reason for m in structure.missed), structure.missed
    assert {"q", "k", "v", "o"} <= {m.site for m in structure.missed}, "linears without a place"
    assert not any(layer.complete for layer in structure.layers)


MLP = {
    "gate reads other": "in an MLP both read the same value",
    "halves overlap": "overlapping parts",
    "unknown activation": "in no attention, no MLP",
    "activation outside": "in no attention, no MLP",
    "widths": "gate gives 1 values where down reads 48",
}


@pytest.mark.parametrize("fault", MLP)
def test_wrong_mlp(fault):
    structure = recovered(fault)
    assert structure.mlps == [] and len(structure.attentions) == 1
    assert any(m.site == "down" and MLP[fault] in m.reason for m in structure.missed), structure.missed
    assert any("No MLP was recovered in this layer" in m.reason for m in structure.missed)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("norm of another", "x would be both"), ("norm over tokens", "is not -1")],
)
def test_wrong_norm(fault, reason):
    structure = recovered(fault)
    assert [n.fqn for n in structure.norms] == ["norm2"]
    assert any("looks like a norm" in m.reason and reason in m.reason for m in structure.missed), (
        structure.missed
    )


@pytest.mark.parametrize("fault", ["no residual", "other residual"])
def test_wrong_residual(fault):
    structure = recovered(fault)
    assert len(structure.attentions) == 1 and len(structure.mlps) == 1
    assert any("on no residual stream" in m.reason for m in structure.missed)
    assert [layer.attention for layer in structure.layers] == [None]


def program_of(function, *inputs, **weights):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            for name, weight in weights.items():
                self.register_parameter(name, nn.Parameter(weight))

        def forward(self, *args):
            return function(self, *args)

    return capture.from_export(torch.export.export(Module(), inputs, strict=False))


X, W, B = torch.randn(2, 3, 8), torch.randn(8, 12), torch.randn(12)
LINEARS = {
    "linear": (lambda m, x: linear(x, m.w, m.b), W.T, False),
    "linear by a transposed weight": (lambda m, x: linear(x, m.w.t(), m.b), W, True),
    "matmul": (lambda m, x: x @ m.w, W, True),
    "matmul by a transposed weight": (lambda m, x: x @ m.w.T, W.T, False),
    "matmul and a bias": (lambda m, x: x @ m.w + m.b, W, True),
    "mm": (lambda m, x: torch.mm(x.reshape(6, 8), m.w).reshape(2, 3, 12), W, True),
    "addmm": (lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w).view(2, 3, 12), W, True),
    "addmm by a transposed weight": (
        lambda m, x: torch.addmm(m.b, x.view(-1, 8), m.w.transpose(0, 1)).view(2, 3, 12),
        W.T,
        False,
    ),
}


@pytest.mark.parametrize("spelling", LINEARS)
def test_linear_spellings(spelling):
    function, weight, transposed = LINEARS[spelling]
    program = program_of(function, X, w=weight.contiguous(), b=B)
    (site,) = recover(program).linears
    assert (site.in_features, site.out_features, site.transposed) == (8, 12, transposed)
    assert site.weight_fqn == "w" and (site.bias is None) == ("b" not in function.__code__.co_names)
    assert site.x is program.placeholders[0] and site.output is program.outputs[0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: linear(x, m.w * 2), "computed in the graph by mul"),
        (lambda m, x: linear(x, m.w, m.b.exp()), "not a vector that the model stores"),
        (lambda m, x: torch.addmm(m.b, x[0], m.w.t(), alpha=2), "scales its product"),
    ],
)
def test_what_is_almost_a_linear(function, reason):
    structure = recover(program_of(function, X, w=W.T.contiguous(), b=B))
    assert structure.linears == [] and [reason in m.reason for m in structure.missed] == [True]


def test_a_product_of_two_inputs_is_no_linear():
    structure = recover(program_of(lambda m, x, y: x @ y, X, X.transpose(1, 2)))
    assert structure.linears == [] and structure.missed == []
