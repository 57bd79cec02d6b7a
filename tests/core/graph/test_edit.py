"""Putting a call in a graph, and letting another node be read."""

import operator

import pytest
import torch
from small_programs import program as captured

from thresher.errors import ThresherError
from thresher.graph.edit import call_before, replace
from thresher.graph.nodes import value

aten = torch.ops.aten


def made(function, dynamic=None):
    x = torch.randn(3, 4)
    program = captured(function, {"x": x}, dynamic=dynamic)
    return x, program


def test_a_call_has_its_place_and_a_fake_result_of_symbolic_size():
    batch = torch.export.Dim("batch", min=2, max=64)
    _x, program = made(lambda x: x.relu() * 2, {"x": {0: batch}})
    relu, double = program.nodes()
    relu.meta["nn_module_stack"] = {"a": ("act", torch.nn.ReLU)}
    new = call_before(double, aten.sum.dim_IntList, (relu, [1]), {"dtype": torch.float64}, like=relu)
    assert new.next is double and new.meta["nn_module_stack"] == relu.meta["nn_module_stack"]
    assert value(new).dtype == torch.float64 and value(new).shape == value(relu).shape[:1]
    assert isinstance(value(new).shape[0], torch.SymInt)
    assert call_before(double, aten.neg.default, (relu,)).meta.keys() == double.meta.keys()


@pytest.mark.parametrize("erase", [False, True])
def test_a_node_computed_from_the_one_it_replaces(erase):
    x, program = made(lambda x: (x.relu() * 2, x.relu() + 1))
    relu = program.nodes(aten.relu.default)[0]
    half = call_before(relu.next, aten.div.Tensor, (relu, 2))
    third = call_before(relu.next.next, aten.sub.Tensor, (half, relu))  # reads the old one too
    assert replace(relu, third, erase) is third
    program.clean()
    assert set(relu.users) == {half, third}
    expected = x.relu() / 2 - x.relu()
    torch.testing.assert_close(program.run(x)[0], expected * 2)


@pytest.mark.parametrize("erase", [False, True])
def test_what_nothing_reads_any_more_is_erased_where_asked(erase):
    x, program = made(lambda x: x.relu() * 2)
    relu, _double = program.nodes()
    replace(relu, call_before(relu, aten.neg.default, relu.args), erase)
    assert (relu in list(program.graph.nodes)) is not erase
    program.clean()
    assert relu not in list(program.graph.nodes)
    torch.testing.assert_close(program.run(x)[0], -x * 2)


def test_several_results():
    x, program = made(lambda x: torch.ops.aten.split.Tensor(x, 2, 1))
    split = program.nodes(aten.split.Tensor)[0]
    parts = tuple(call_before(split, aten.slice.Tensor, (split.args[0], 1, at, at + 2)) for at in (2, 0))
    assert replace(split, parts, erase=True) is parts[0]
    assert not program.nodes(operator.getitem, aten.split.Tensor)
    program.clean()
    for got, expected in zip(program.run(x), (x[:, 2:], x[:, :2]), strict=True):
        torch.testing.assert_close(got, expected)


def test_several_results_read_at_once_are_refused_by_name():
    _x, program = made(lambda x: torch.cat(torch.ops.aten.split.Tensor(x, 2, 1)[::-1]))
    split = program.nodes(aten.split.Tensor)[0]
    cat = program.nodes(aten.cat.default)[0]
    cat.args = (split,)
    with pytest.raises(ThresherError, match=f"{split.name} gives several results, and {cat.name} takes them"):
        replace(split, (split.args[0], split.args[0]))
