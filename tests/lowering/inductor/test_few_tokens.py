"""Linears of one or two tokens become few_linear in Inductor's programs, and are called without the dispatcher."""

import pytest
import torch
from torch import nn
from two_linears import Two, graph_of

import thresher
from thresher import ops
from thresher.kernels import catalog, few_linear, native
from thresher.lowering.inductor import direct_calls, few_tokens

needs_kernel = pytest.mark.skipif(native.load_error("few_linear") is not None, reason="no C++ compiler")


@pytest.fixture
def eager_to_rewrite(monkeypatch):
    """As if every shape were measured to gain, however small."""
    monkeypatch.setattr(few_tokens, "LEAST_BYTES", 0)
    monkeypatch.setattr(few_linear, "saves", lambda *shape: 1.0)


def test_relu_is_taken_along(eager_to_rewrite):
    graph = graph_of(Two().eval(), torch.randn(1, 64))
    assert few_tokens.rewrite(graph) == 2
    made = [n for n in graph.nodes if n.target is few_linear.few_linear.overload]
    assert [n.args[3] for n in made] == [True, False]
    assert not any(n.target is torch.ops.aten.relu.default for n in graph.nodes)


def test_more_tokens_half_types_and_shapes_without_gain_stay(eager_to_rewrite, monkeypatch):
    assert few_tokens.rewrite(graph_of(Two().eval(), torch.randn(3, 64))) == 0
    assert few_tokens.rewrite(graph_of(Two().half().eval(), torch.randn(1, 64).half())) == 0
    monkeypatch.setattr(few_linear, "saves", lambda *shape: 0.0)
    assert few_tokens.rewrite(graph_of(Two().eval(), torch.randn(1, 64))) == 0


def test_as_many_tokens_as_data_decide_are_left_alone(eager_to_rewrite):
    """Where a size is known at the call only, nothing may be asked of it, its strides included."""

    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 96, bias=False)

        def forward(self, x):
            return self.head(x[x[:, :, 0] > 0].unflatten(0, (-1, 2)))

    assert few_tokens.rewrite(graph_of(Chosen().eval(), torch.randn(2, 6, 64))) == 0


@needs_kernel
def test_one_token_of_a_batch_does_not_change_with_its_company():
    weight, x = torch.randn(96, 300), torch.randn(2, 300)
    both = few_linear.few_linear(x, weight, None, False)
    wide = few_linear.few_linear(x[:1], weight, None, False)
    assert torch.equal(both[:1], wide)


@needs_kernel
def test_nan_goes_through_relu():
    x = torch.full((1, 64), float("nan"))
    assert few_linear.few_linear(x, torch.randn(8, 64), None, True).isnan().all()


@needs_kernel
def test_inductor_runs_it_without_the_dispatcher(eager_to_rewrite, monkeypatch):
    model, x = Two(48).eval(), torch.randn(1, 48)
    assert direct_calls.install()
    dispatched = []
    overload = ops.get("few_linear").overload
    monkeypatch.setattr(
        type(overload), "__call__", lambda self, *a, **k: dispatched.append(self) or self._op(*a, **k)
    )
    compiled = thresher.compile(model, (x,), thresher.Recipe(()))
    dispatched.clear()
    before = few_linear.few_linear.calls["cpu_cpp"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert few_linear.few_linear.calls["cpu_cpp"] == before + 2
    assert overload not in dispatched


def test_a_direct_call_takes_arguments_by_name():
    catalog.load()
    op = ops.get("nvfp4_linear")
    x, *weights = next(iter(op.inputs(torch.device("cpu"), torch.float32))).args[:4]
    named = torch.ops.thresher.nvfp4_linear.default.direct(x, *weights, activations="int16")
    assert torch.equal(named, torch.ops.thresher.nvfp4_linear(x, *weights, None, None, "int16"))
    with pytest.raises(TypeError, match="shape"):
        op.direct(x, *weights, shape=3)
