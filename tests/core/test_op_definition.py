"""Definitions of operators and their providers are checked against the schema when they are registered."""

import functools

import pytest
import torch

from thresher import ops
from thresher.errors import ArgumentError
from thresher.plain_form import Plain

SCHEMA = "checked_{}(Tensor x, int k, float scale=1.0) -> Tensor"


def define(name, reference=lambda x, k, scale=1.0: x * k * scale, **given):
    given = {"fake": lambda x, k, scale=1.0: torch.empty_like(x), "inputs": lambda device, dtype: []} | given
    return ops.define(SCHEMA.format(name), tolerance={torch.float32: 0.0}, **given)(reference)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Operators of these tests are no operators of other tests."""
    before = dict(ops._OPS)
    yield
    ops._OPS.clear()
    ops._OPS.update(before)


@pytest.fixture(scope="module")
def op():
    return define("provided", providers=("first", "second"))


WRONG = [
    (lambda x, k: x, "scale missing"),
    (lambda x, k, scale: x, "scale has no default, and in the schema one"),
    (lambda x, k, scale=2.0: x, r"scale=2.0, and in the schema 1.0"),
    (lambda x, k=3, scale=1.0: x, "k has a default, and in the schema none"),
    (lambda k, x, scale=1.0: x, "in another order"),
    (lambda x, n, scale=1.0: x, "k missing; n not in the schema"),
    (lambda x, k, scale=1.0, more=None: x, "more not in the schema"),
    (lambda x, *rest: x, r"\*rest is no plain argument"),
    (lambda x, k, *, scale=1.0: x, "is no plain argument"),
    (lambda: None, "x, k, scale missing"),
]


@pytest.mark.parametrize("function, said", WRONG, ids=[said for _, said in WRONG])
def test_a_provider_of_another_signature_is_refused(op, function, said):
    with pytest.raises(ArgumentError, match=said) as caught:
        op.provider("wrong", device="cpu")(function)
    assert "provider 'wrong' of thresher::checked_provided" in str(caught.value)
    assert "int k, float scale=1." in str(caught.value)  # the schema is shown
    assert "wrong" not in op.provider_names()


@pytest.mark.parametrize("function, said", WRONG, ids=[said for _, said in WRONG])
def test_so_is_a_reference_and_a_plain_form(function, said):
    with pytest.raises(ArgumentError, match="reference of thresher::checked_never"):
        define("never", function)
    with pytest.raises(ArgumentError, match="plain of thresher::checked_never"):
        define("never", plain=Plain(run=function))
    assert "checked_never" not in ops._OPS  # and nothing of it was registered: another try may be right
    assert not hasattr(torch.ops.thresher, "checked_never")


def test_what_is_asked_beside_the_operator_may_name_arguments_as_it_likes(op):
    with pytest.raises(ArgumentError, match="supports_args of provider 'wrong'"):
        op.provider("wrong", device="cpu", supports_args=lambda x: None)(lambda x, k, scale=1.0: x)
    with pytest.raises(ArgumentError, match="fake of thresher::checked_never"):
        define("never", fake=lambda x: x)
    define("shared_fake", fake=lambda t, *rest: torch.empty_like(t))


def test_what_cannot_be_read_is_refused(op):
    with pytest.raises(ArgumentError, match="a Python function whose arguments can be read"):
        op.provider("wrong", device="cpu")(torch.add)


def test_wrapped_functions_are_read_through(op):
    def run(mode, x, k, scale=1.0):
        return x

    op.provider("partial", device="meta")(functools.partial(run, "fast"))
    assert op.provider_names()[-2] == "partial"


def test_providers_are_preferred_in_the_order_of_the_definition():
    op = define("ordered", providers=("first", "second"))
    for name in ("outside", "second", "first", "later"):
        op.provider(name, device="cpu")(lambda x, k, scale=1.0: x)
    assert op.provider_names() == ["first", "second", "outside", "later", "reference"]


def test_an_operator_is_found_by_what_a_node_calls():
    op = define("found")
    assert ops.of(op.overload) is op
    assert ops.of(torch.ops.aten.add.Tensor) is None and ops.of(len) is None
    with pytest.raises(ArgumentError, match="Did you mean 'checked_found'"):
        ops.get("checked_foundd")
