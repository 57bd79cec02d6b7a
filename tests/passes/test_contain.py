"""A pass that raises, or writes to the model's weights: named by thresher.compile, left out by torch.compile."""

import dataclasses

import pytest
import torch
from torch import nn

import thresher
from thresher import sessions
from thresher.errors import ArgumentError, ContractError
from thresher.notices import ThresherWarning
from thresher.passes.base import PASSES, Effect, Match, Pass
from thresher.recipe import CONFIGS, PassConfig


def _inplace(program, write):
    write(next(w.tensor for w in program.weights.values() if w.tensor.dim() == 2))


def _node(program, match):
    program.output_node.args = ((program.placeholders[0], 3.5, object()),)  # no such thing in the dialect


def _raise(*_):
    raise ZeroDivisionError("on purpose")


FAULTS = {
    "raises in match": ("match", _raise),
    "raises in rewrite": ("rewrite", _raise),
    "raises in prepare": ("prepare", _raise),
    "writes in match": ("match", lambda p: _inplace(p, lambda t: t.mul_(2))),
    "writes in rewrite": ("rewrite", lambda p: _inplace(p, lambda t: t.mul_(2))),
    "writes in prepare": ("prepare", lambda p: _inplace(p, lambda t: t.zero_())),
    "writes through data": ("rewrite", lambda p: _inplace(p, lambda t: t.data.mul_(2))),
    "writes to a view": ("rewrite", lambda p: _inplace(p, lambda t: t[1:, 0].add_(1))),
    "writes by out": ("rewrite", lambda p: _inplace(p, lambda t: torch.add(t, 1, out=t.detach()))),
    "writes to a list": ("rewrite", lambda p: _inplace(p, lambda t: torch._foreach_mul_([t.data], 2.0))),
    "writes by an index": ("rewrite", lambda p: _inplace(p, lambda t: t.data.__setitem__(0, 1.0))),
}


@pytest.fixture
def faulty(request):
    """Registers a pass from outside that does one of FAULTS, and doubles the output otherwise."""
    where, act = FAULTS[request.param]

    @dataclasses.dataclass(frozen=True)
    class Config(PassConfig):
        name = "faulty"

    class Faulty(Pass):
        name, config_type, effect = "faulty", Config, Effect(exact=True, budget=10.0)

        def do(self, at, program):
            if at == where:
                act(program)

        def prepare(self, program, context):
            self.do("prepare", program)

        def match(self, program, context):
            self.do("match", program)
            return [Match("it")]

        def rewrite(self, program, match, context):
            self.do("rewrite", program)

    CONFIGS["faulty"], PASSES["faulty"] = Config, Faulty()
    Faulty.__module__ = "somebodys_package"
    yield
    del CONFIGS["faulty"], PASSES["faulty"]


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()


OTHERS = {"bf16": {"min_weights": 0, "emulate": True}}


@pytest.mark.parametrize("faulty", FAULTS, indirect=True)
def test_torch_compile_leaves_the_pass_out_says_so_and_runs_the_others(faulty, model):
    x, kept = torch.randn(3, 8), [p.detach().clone() for p in model.parameters()]
    options = {"recipe": "none", "faulty": True, **OTHERS, "target": "reference"}
    fast = torch.compile(model, backend="thresher", options=options)
    with torch.no_grad(), pytest.warns(ThresherWarning, match="left out a pass.*'faulty'"):
        got = fast(x)
        want = model(x)
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept))
    report = sessions.recent()[-1].report
    assert report["bf16"].rewritten and not report["faulty"].rewritten
    assert "faulty" in report["faulty"].dropped and "left out" in str(report)
    assert type(report).from_dict(report.to_dict())["faulty"].dropped == report["faulty"].dropped


@pytest.mark.parametrize("faulty", FAULTS, indirect=True)
def test_thresher_compile_raises_and_names_the_pass(faulty, model):
    kept = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ContractError, match="'faulty'"):
        thresher.compile(model, (torch.randn(3, 8),), "none", faulty=True, target="reference")
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept))


@pytest.mark.parametrize("faulty", ["raises in match"], indirect=True)
def test_what_a_pass_says_to_the_user_is_not_contained(faulty, model, monkeypatch):
    def match(program, context):
        raise ArgumentError("stats", "another model's", "this one's", "Calibrate again.")

    monkeypatch.setattr(PASSES["faulty"], "match", match)
    with pytest.raises(ArgumentError, match="Calibrate again"):
        thresher.compile(model, (torch.randn(3, 8),), "none", faulty=True, target="reference")


def test_what_cannot_be_stopped_is_noticed(model, monkeypatch):
    """A built-in pass runs without the guard, and numpy writes past it."""
    rewrite = type(PASSES["bf16"]).rewrite

    def writing(self, program, match, context):
        next(w.tensor for w in program.weights.values()).data.numpy()[:] = 1
        return rewrite(self, program, match, context)

    monkeypatch.setattr(type(PASSES["bf16"]), "rewrite", writing)
    with pytest.raises(ContractError, match="'bf16' writes to"):
        thresher.compile(model, (torch.randn(3, 8),), "none", target="reference", **OTHERS)
