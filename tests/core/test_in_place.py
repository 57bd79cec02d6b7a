"""Writes to a tensor the graph made itself become ordinary results; other writes are refused."""

import pytest
import torch
import zoo

from thresher import capture
from thresher.errors import DialectError


def exported(function, *inputs):
    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    return torch.export.export(Module(), inputs, strict=False)


def test_a_write_to_a_fresh_tensor():
    def function(x):
        y = x * 2
        before = y + 1
        y += x
        y.mul_(3)
        return y, before

    x = torch.randn(4, 5)
    program = capture.from_export(exported(function, x))
    for got, expected in zip(program.run(x), function(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_write_that_another_value_sees_is_refused():
    def function(x):
        y = x * 2
        row = y[0]
        y.add_(1)
        return y, row

    with pytest.raises(DialectError, match="none may write to its arguments"):
        capture.from_export(exported(function, torch.randn(4, 5)))


def test_t5_adds_its_position_bias_in_place():
    model, inputs = zoo.ZOO["t5_encoder"].build()
    program = capture.from_export(torch.export.export(model, (), inputs, strict=False))
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        result = program.run(*(inputs[name] for name in program.input_names))[0]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
