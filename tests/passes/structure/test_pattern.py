"""The matcher: order of operands, casts, repeated variables, and the tale of the best failure."""

import pytest
import torch

from thresher.graph import capture
from thresher.passes.structure.pattern import Anything, Number, Var, call, described, either, match, uncast

aten = torch.ops.aten
add, mul, tanh = call(aten.add.Tensor), call(aten.mul.Tensor), call(aten.tanh.default)
x, y = Var("x"), Var("y")


def result_of(function, *inputs):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = capture.from_export(torch.export.export(Module(), inputs, strict=False))
    return program.outputs[0]


A, B = torch.randn(2, 3), torch.randn(2, 3)


@pytest.mark.parametrize("function", [lambda a, b: a.tanh() * (b + 1), lambda a, b: (b + 1) * a.tanh()])
def test_products_match_in_either_order(function):
    node = result_of(function, A, B)
    found = match(mul(tanh(x), add(y, Number("one"))), node)
    assert (found["x"].name, found["y"].name, found["one"]) == ("args_0", "args_1", 1)
    assert len(found.nodes) == 3 and found.nodes[0] is node


def test_differences_do_not():
    sub = call(aten.sub.Tensor)
    assert match(sub(tanh(x), y), result_of(lambda a, b: a.tanh() - b, A, B))
    assert not match(sub(tanh(x), y), result_of(lambda a, b: b - a.tanh(), A, B))


def test_a_variable_stands_for_one_value():
    assert match(mul(x, tanh(x)), result_of(lambda a, b: a * a.tanh(), A, B))
    failed = match(mul(x, tanh(x)), result_of(lambda a, b: a * b.tanh(), A, B))
    assert not failed and failed.reason == "x would be both args_0 and args_1" and failed.covered == 2


def test_an_operand_order_that_fails_later_is_taken_back():
    """The first factor could be x; only the second order makes both occurrences equal."""
    pattern = mul(x, add(tanh(x), Number("n")))
    assert match(pattern, result_of(lambda a: (a.tanh() + 2) * a, A))["x"].name == "args_0"


def test_floating_casts_are_looked_through_and_others_are_not():
    node = result_of(lambda a: a.float().tanh().to(torch.bfloat16) * 2, A.bfloat16())
    found = match(mul(tanh(x), Number("n")), node)
    assert found["x"].op == "call_function" and uncast(found["x"]).op == "placeholder"
    node = result_of(lambda a: a.long().float().tanh(), A)
    assert uncast(match(tanh(x), node)["x"]).target is aten.to.dtype


def test_constants():
    node = result_of(lambda a: a * 0.7978845608028654, A)
    assert match(mul(x, 0.79788456), node) and not match(mul(x, 0.79), node)
    assert not match(mul(x, True), result_of(lambda a: a * 2, A))
    power = call(aten.pow.Tensor_Scalar)
    assert match(power(x, 2), result_of(lambda a: a**2, A)) and not match(
        power(x, 3), result_of(lambda a: a**2, A)
    )


def test_keyword_arguments_must_be_the_same():
    node = result_of(lambda a: torch.nn.functional.gelu(a, approximate="tanh"), A)
    gelu = call(aten.gelu.default)
    assert match(gelu(x, approximate="tanh"), node) and not match(gelu(x), node)
    assert not match(add(x, y), result_of(lambda a, b: torch.add(a, b, alpha=2), A, B))


def test_lists_and_anything():
    node = result_of(lambda a, b: torch.cat([a, b.tanh()], -1), A, B)
    cat = call(aten.cat.default)
    assert match(cat([x, tanh(y)], -1), node)["y"].name == "args_1"
    assert not match(cat([tanh(x), y], -1), node) and not match(cat([x], -1), node)
    reshape = call(aten.reshape.default)
    assert match(reshape(x, Anything()), result_of(lambda a: a.reshape(3, 2), A))


def test_the_best_failure_is_told():
    pattern = either(tanh(tanh(tanh(x))), tanh(mul(x, 2)))
    failed = match(pattern, result_of(lambda a: a.sin().tanh().tanh(), A))
    assert not failed and failed.covered == 2 and failed.reason == "sin (sin.default) is not tanh.default"
    assert described(3) == "3"
