"""Both captures give one dialect, and a Program's text is Python that runs."""

import captures
import pytest
import torch
import zoo

from thresher.errors import DialectError, ThresherError
from thresher.graph import capture, dialect
from thresher.graph.nodes import value
from thresher.graph.program import Program


def spelled(program: Program) -> list[str]:
    """Operators in order, weights by name; what two equal programs share."""
    names = {n: w.fqn for n, w in program.weights.items()}
    return [
        names.get(str(n.target), str(n.target))
        for n in program.graph.nodes
        if n.op in ("call_function", "get_attr")
    ]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dynamo_and_export_give_the_same_operators(name):
    one, other = captures.of_zoo(name, "export"), captures.of_zoo(name, "dynamo")
    tensors = [[s for s in spelled(p) if "aten" in s] for p in (one, other)]
    assert tensors[0] == tensors[1]
    assert {w.fqn for w in one.weights.values()} == {w.fqn for w in other.weights.values()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5_encoder"])
def test_text_is_python_that_gives_the_models_result(name):
    if name not in zoo.ZOO:
        name = next(n for n in zoo.ZOO if n.startswith("t5"))
    program = captures.of_zoo(name, "export")
    scope = {}
    exec(compile(program.text(), "program", "exec"), scope)
    _, inputs = zoo.ZOO[name].build()
    weights = {w.fqn: w.tensor for w in program.weights.values()}
    with torch.no_grad():
        given = captures.arguments(program, inputs)
        for expected, actual in zip(program.run(*given), scope["program"](weights, *given), strict=True):
            assert torch.equal(expected, actual)


def test_weights_share_the_models_storage():
    model, inputs = zoo.ZOO["llama"].build()
    program = captures.dynamo(model, inputs)
    live = dict(model.named_parameters())
    shared = [w for w in program.weights.values() if w.fqn in live]
    assert len(shared) >= 10
    assert all(w.tensor.data_ptr() == live[w.fqn].data_ptr() for w in shared)


def broken(program: Program, how: str) -> Program:
    program = program.copy()
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.silu.default)
    if how == "writes":
        node.target = torch.ops.aten.silu_.default
    elif how == "foreign":
        node.target = torch.nn.functional.silu
    elif how == "unlabelled":
        del node.meta["val"]
    return program


@pytest.mark.parametrize(
    ("how", "rule"),
    [("writes", "functional"), ("foreign", "ATen or thresher operator"), ("unlabelled", "meta\\['val'\\]")],
)
def test_the_verifier_names_node_and_rule(how, rule):
    program = captures.of_zoo("llama", "export")
    dialect.verify(program)
    with pytest.raises(DialectError, match=rule) as raised:
        dialect.verify(broken(program, how), after="my pass")
    assert "my pass" in str(raised.value) and "silu" in str(raised.value)


def test_a_model_that_writes_to_its_buffers_is_refused():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x * self.calls

    from thresher.graph.capture import from_export

    with pytest.raises(ThresherError, match="writes to 'calls'"):
        from_export(torch.export.export(Counting(), (torch.randn(2),)))


def test_how_many_of_the_last_places_are_kept_is_a_number_of_the_program():
    """Else the size of what is kept is one that only data decide, and no step of a decoder could be compiled for it."""

    class Last(torch.nn.Module):
        def forward(self, hidden, keep):
            return (hidden * 2)[:, slice(-keep, None), :]

    model = Last()
    programs = []

    def backend(graph_module, example_inputs):
        programs.append(capture.from_dynamo(graph_module, example_inputs)[0])
        return graph_module.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, dynamic=True)
    hidden = torch.randn(2, 7, 4)
    for keep in (3, 1, 0, 3):
        assert torch.equal(run(hidden, keep), model(hidden, keep))
    kept = [value(p.outputs[0]).shape[1] for p in programs]
    assert kept[:2] == [3, 1] and len(programs) == 3
