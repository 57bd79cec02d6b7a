"""Captured `torch.vmap`: plain operators on whole tensors, and no constant without values."""

import pytest
import torch

from thresher.errors import CaptureError
from thresher.graph import capture, dialect


def captured(function, *inputs, dynamic=None):
    found = []

    def backend(gm, example_inputs):
        found.append(capture.from_dynamo(gm, example_inputs)[0])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return found[0]


def pairs(x):
    """A mask made as transformers makes one: a function of two positions, mapped over both."""
    at = torch.arange(x.shape[0])
    seen = torch.vmap(torch.vmap(lambda q, k: (k <= q) & (x[k].sum() > 0), (None, 0)), (0, None))(at, at)
    return x.sum(1)[:, None] * seen


@pytest.mark.parametrize("function", [
    lambda x: torch.vmap(lambda row: row * row.sum(), in_dims=1, out_dims=1)(x),
    lambda x: torch.vmap(lambda a, b: (a @ b, a - b))(x, x + 1)[0] + torch.vmap(torch.sin)(x).sum(),
    pairs,
])  # fmt: skip
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mapped_function_is_captured_with_its_values(function, dynamic):
    x = torch.randn(4, 5)
    program = captured(function, x, dynamic=dynamic)
    dialect.verify(program)
    assert not any(w.fqn.startswith("constant") and w.tensor.dim() for w in program.weights.values())
    inputs = [
        x if isinstance(p.meta["val"], torch.Tensor) else int(p.meta["val"]) for p in program.placeholders
    ]
    torch.testing.assert_close(program.run(*inputs)[0], function(x))


def test_a_constant_without_values_is_an_error_at_capture(monkeypatch):
    monkeypatch.setattr(capture, "without_vmap", lambda source, mode: source)
    with pytest.raises(Exception, match="are not known: an operator there hides its result") as raised:
        captured(lambda x: torch.vmap(lambda row: row * row.sum())(x), torch.randn(4, 5))
    assert isinstance(raised.value.inner_exception, CaptureError)
