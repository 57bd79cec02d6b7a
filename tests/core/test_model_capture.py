"""Capturing a model from example inputs: one way for every door."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import thresher
from thresher import model_capture, testing
from thresher.errors import ArgumentError, CaptureError

SOURCE = Path(thresher.__file__).parent


@pytest.mark.parametrize("given", [[1, 2], "text", 3, None, torch.ones(2)], ids=str)
def test_example_inputs_are_arguments(given):
    if isinstance(given, list):
        assert model_capture.example(given) == ((1, 2), {})
    else:
        with pytest.raises(ArgumentError, match="example_inputs"):
            model_capture.example(given)


def test_a_graph_is_shown_and_the_model_runs_as_it_is():
    model, inputs = testing.tiny_model(layers=1)
    seen = []

    def look(gm, args):
        seen.append(gm)
        return gm.forward

    result = model_capture.shown_to(look, model)(**inputs)
    assert len(seen) == 1 and not result.requires_grad
    torch.testing.assert_close(result, model(**inputs).detach())


def test_an_error_of_ours_arrives_as_it_is():
    model, inputs = testing.tiny_model(layers=1)

    def refuse(gm, args):
        raise CaptureError("No.")

    with pytest.raises(CaptureError, match=r"^No\.$"):
        model_capture.shown_to(refuse, model)(**inputs)


def test_a_model_that_cannot_be_exported_is_an_error_of_ours():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x * float(x.sum() > 0 and 2)

    with pytest.raises(CaptureError, match=r"torch\.export cannot capture the model"):
        model_capture.exported(Odd(), (torch.ones(3),), {})


def test_the_cache_is_switched_off_and_on_again_also_when_something_raises():
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(use_cache=True)
    with pytest.raises(KeyError), model_capture.without_cache(model):
        assert model.config.use_cache is False
        raise KeyError
    assert model.config.use_cache is True
    with model_capture.without_cache(torch.nn.Linear(1, 1)):
        pass


def test_no_other_file_captures_a_model():
    """torch.export.export once; torch.compile only where a compiled model is made or timed."""
    called = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ("torch.compile", "torch.export.export")
            if isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in names:
                called.setdefault(name, set()).add(path.relative_to(SOURCE).as_posix())
    assert called["torch.export.export"] == {"model_capture.py"}
    assert called["torch.compile"] == {
        "api.py",
        "compat.py",  # which asks it what it takes
        "compiled.py",
        "model_capture.py",
        "tools/bench.py",
        "tools/demo.py",
    }


def test_a_single_graph_is_seen_without_being_run_and_several_are_counted():
    class Parts(torch.nn.Module):
        def __init__(self, cut):
            super().__init__()
            self.table, self.cut = torch.nn.Embedding(4, 3), cut

        def forward(self, ids):
            x = self.table(ids)
            if self.cut:
                torch._dynamo.graph_break()
            return x + 1

    beyond = {"ids": torch.full((2, 5), 9)}  # which the table does not hold, so that running it would fail
    assert len(model_capture.graphs(Parts(False), beyond)) == 1
    assert len(model_capture.graphs(Parts(True), {"ids": torch.zeros(2, 5, dtype=torch.long)})) == 2
