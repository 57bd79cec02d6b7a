"""A model that Dynamo cuts: its parts are named as the model names them, its head is one, and why nothing packs is said."""

import pytest
import torch
from torch import nn

from thresher import sessions
from thresher.undone import why

OPTIONS = {
    "prepack": True,
    "nvfp4": {"min_weights": 0, "budget": 9.0},
    "min_gain": 0.0,
    "target": "reference",
}
VOCABULARY = 96


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.up(x)


class Mixture(nn.Module):
    """Calls those experts that got a token, which Dynamo cannot trace."""

    def __init__(self, width=64):
        super().__init__()
        self.router = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        best, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(best == number)
            if rows.numel():
                out[rows] = expert(flat[rows])
        return out.reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.moe = Mixture()

    def forward(self, x, mask):
        q, k, v = (l(x).unflatten(-1, (4, 16)).transpose(1, 2) for l in (self.q, self.k, self.v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        return x + self.moe(x)


class Body(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask.bool()[:, None, None])
        return x


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(64, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.body.embed.weight

    def forward(self, input_ids, attention_mask):
        return self.head(self.body(input_ids, attention_mask))


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def reports(request):
    """Of each graph, and of the model as `model.compile` has it where the head is tied."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(request.param).eval()
    ids = torch.randint(1, VOCABULARY, (3, 8))
    mask = (torch.arange(8) < torch.tensor([8, 5, 2])[:, None]).long()
    if request.param:
        model.compile(backend="thresher", options=OPTIONS)
    compiled = model if request.param else torch.compile(model, backend="thresher", options=OPTIONS)
    with sessions.collect() as built, torch.no_grad():
        compiled(ids, mask)
    return [s.report for s in built]


def test_weights_have_the_names_of_the_model(reports):
    rewritten = {site for r in reports for site in r["nvfp4"].rewritten}
    assert {f"body.layers.0.{name}" for name in "qkvo"} <= rewritten
    assert "body.layers.0.moe.experts.0.up" in rewritten
    assert all(site.startswith("body.layers.") for site in rewritten)


def test_the_head_is_kept(reports):
    kept = [m for r in reports for m in r["nvfp4"].missed if "keep='head'" in m.reason]
    assert [m.site for m in kept] == ["head"]


def test_the_reasons_say_where_the_model_is_cut(reports):
    said = why([r["prepack"] for r in reports])
    assert said.startswith(f"None of {len(reports)} graphs, each looked at alone, has all it needs.")
    assert "This graph is a part of the model and has no attention_mask: Dynamo cut" in said
    noted = [n for r in reports for n in r.notes if n.startswith("Dynamo cut")]
    assert len(noted) == len(reports)
    assert any("of test_whole_model.py" in n for n in noted)
