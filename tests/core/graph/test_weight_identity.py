"""Weights are told apart by what they are, whatever they are called: many models of one class in one function."""

import functools
import types

import pytest
import torch
from torch import nn

import thresher
from thresher import sessions
from thresher.graph import capture, names

PLAIN = {"recipe": "none", "target": "reference"}
DERIVED = {"recipe": "none", "bf16": {"min_weights": 0, "emulate": True}, "target": "reference"}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x):
        return torch.relu(self.lin(x)) + self.shift


class Listed(nn.Module):
    """Layers in a plain list and a dict beside one of its own, which is called as theirs would be and never runs."""

    def __init__(self):
        super().__init__()
        self.listed = [Layer() for _ in range(3)]
        self.by_key = {"a": Layer(), "b": nn.Linear(16, 16)}
        self.lin, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        for layer in self.listed:
            x = layer(x)
        return self.out(self.by_key["b"](self.by_key["a"](x)))


def layers(count=2, make=Layer):
    torch.manual_seed(3)
    return [make().eval() for _ in range(count)]


def closure():
    first, second = layers()
    return (lambda x: (first(x), second(x))), [first, second]


def bare_linears():
    first, second = layers(make=lambda: nn.Linear(16, 16))
    return (lambda x: (first(x), second(x))), [first, second]


def arguments():
    found = layers()
    return functools.partial(lambda a, b, x: a(x) - 2 * b(x), *found), found


def in_a_list():
    found = layers(3)
    found.append(found[0])  # shared
    return (lambda x: [layer(x) for layer in found]), found


def in_an_object():
    found = layers()
    holder = types.SimpleNamespace(first=found[0], rest={"second": found[1]})
    return (lambda x: holder.rest["second"](holder.first(x))), found


def through_methods():
    found = layers()
    return (lambda x: found[0].forward(x) + found[1].forward(x)), found


def one_of_two():
    found = layers(1) + layers(1, make=nn.Sequential) + [nn.Sequential(Layer(), Layer()).eval()]
    return (lambda x: found[2](found[0](x)) + found[2][1](x)), found


@pytest.mark.parametrize("options", [PLAIN, DERIVED], ids=["plain", "derived"])
@pytest.mark.parametrize(
    "make", [closure, bare_linears, arguments, in_a_list, in_an_object, through_methods, one_of_two]
)
def test_each_module_of_a_function_keeps_its_own_weights(make, options):
    function, modules = make()
    torch._dynamo.reset()
    fast = torch.compile(function, backend="thresher", options=options)
    x, allowed = torch.randn(4, 16), 0.0 if options is PLAIN else 0.1

    def check():
        with torch.no_grad():
            for got, want in zip(pieces(fast(x)), pieces(function(x)), strict=True):
                assert (got - want).abs().max() <= allowed * want.abs().max()

    check()
    with torch.no_grad():  # a write to the last of them reaches what was made from it, and no other
        for parameter in modules[-1].parameters():
            parameter.mul_(-3)
    check()


def pieces(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_a_model_with_modules_in_a_list_runs_and_is_saved_with_their_weights(tmp_path):
    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(4, 16)
    compiled = thresher.compile(model, (x,), "none", target="reference")
    with torch.no_grad():
        model.listed[1].lin.weight.mul_(2)
        model.by_key["b"].weight = nn.Parameter(torch.randn(16, 16))
        want = model(x)
    assert torch.equal(compiled(x), want)
    fqns = sorted(w.fqn for w in compiled.sessions[-1].program.weights.values())
    assert len(set(fqns)) == len(fqns) and "listed.1.lin.weight" in fqns and "by_key.b.weight" in fqns
    thresher.save(compiled, tmp_path / "m.thresher", example_inputs=(x,))
    loaded = thresher.load(tmp_path / "m.thresher", target="reference")
    assert torch.equal(loaded(x)["output"], want)


def test_two_packed_models_of_one_class_in_one_function():
    """A bi-encoder under one decorator, its padding removed."""
    from transformers import BertConfig, BertModel

    sizes = dict(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    query, document = (BertModel(BertConfig(**sizes)).eval() for _ in range(2))
    ids, mask = torch.randint(1, 60, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0

    def score(query, document, input_ids, attention_mask):
        return [
            m(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
            for m in (query, document)
        ]

    torch._dynamo.reset()
    fast = torch.compile(score, backend="thresher", options={"recipe": "exact", "target": "reference"})
    with torch.no_grad():
        for got, want in zip(fast(query, document, ids, mask), score(query, document, ids, mask)):
            torch.testing.assert_close(got, want)
    report = sessions.recent()[-1].report
    assert report["prepack"].rewritten
    for account in report.passes:
        sites = [*account.rewritten, *(m.site for m in account.missed)]
        assert len(set(sites)) == len(sites)


@pytest.mark.parametrize(
    "sources, expected",
    [
        (["L['self']._modules['a']._parameters['w']", "L['self']._buffers['b']"], ["a.w", "b"]),
        (["L['q']._modules['a']._parameters['w']", "L['self']._buffers['b']"], ["a.w", "b"]),
        (["L['q']._parameters['w']", "L['d']._parameters['w']"], ["q.w", "d.w"]),
        (["L['q']._parameters['w']", "G['q']._parameters['w']"], ["q.w", "q.w~2"]),
        (["L['s'].l[0]._parameters['w']", "L['s'].l[1]._parameters['w']"], ["l.0.w", "l.1.w"]),
        (["L['s'].l['x.y']._parameters['w']", "L['s'].l['x']._modules['y']._parameters['w']"], ["l.x.y.w", "l.x.y.w~2"]),
    ],
)  # fmt: skip
def test_names_are_short_where_that_tells_weights_apart(sources, expected):
    found = names.weight_names(sources, range(len(sources)))
    if expected[0].startswith("l.x.y"):
        expected = ["s." + name for name in expected]
    assert found == expected


def test_one_tensor_at_two_places_may_have_one_name():
    places = ["L['q']._parameters['w']", "L['d']._parameters['w']"]
    assert names.weight_names(places, [7, 7]) == ["w", "w"]


def test_weights_of_a_module_that_keeps_a_state_are_weights():
    """Dynamo reaches them by way of the module's `__dict__`."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(2, 4, 4))
            self.shift = nn.Parameter(torch.randn(2, 4))
            self.last = None

        def forward(self, x):
            self.last = x[:, -1]
            return torch.baddbmm(self.shift[:, None, :], x, self.gain)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Keeps()

        def forward(self, x):
            return self.inner(self.inner(x))

    programs = []

    def look(gm, inputs):
        programs.append(capture.from_dynamo(gm, inputs)[0])
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Outer(), backend=look)(torch.randn(2, 3, 4))
    assert programs[0].input_names == ["x"]
    assert {w.fqn for w in programs[0].weights.values()} == {"inner.gain", "inner.shift"}
