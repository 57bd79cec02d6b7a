"""A model as a Program, through Dynamo or through torch.export, at fixed or at symbolic sizes."""

from __future__ import annotations

import functools
import weakref

import torch
import zoo

from thresher.graph import capture
from thresher.graph.program import Program
from thresher.model_capture import specialized_floats

WAYS = ("dynamo", "export", "dynamo-dynamic", "export-dynamic")


def dynamo(model: torch.nn.Module, inputs: zoo.Inputs, dynamic: bool = False) -> Program:
    """What a backend of torch.compile is given, epsilons and scales as constants. The model must be one graph."""
    programs = []

    def backend(graph_module, example_inputs):
        programs.append(capture.from_dynamo(graph_module, example_inputs)[0])
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad(), specialized_floats():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(**inputs)
    (program,) = programs
    return program


def of_module(module: torch.nn.Module, **inputs: torch.Tensor) -> Program:
    """`dynamo` of a module as it is when it infers, at fixed sizes."""
    return dynamo(module.eval(), inputs)


def export(model: torch.nn.Module, inputs: zoo.Inputs, dynamic: bool = False) -> Program:
    """Without a KV cache among the outputs, which export would need to be told about."""
    model.config.use_cache = False
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=64)
    shapes = {name: {0: batch, 1: sequence} for name in inputs} if dynamic else None
    with torch.no_grad():
        return capture.from_export(
            torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)
        )


_EXPORTED: weakref.WeakKeyDictionary[torch.nn.Module, dict[object, Program]] = weakref.WeakKeyDictionary()


def once(model: torch.nn.Module, inputs: zoo.Inputs) -> Program:
    """`export` at fixed sizes, done once for inputs of the same names, shapes and dtypes. Only for a model that no test
    changes, and whose graph does not depend on what its inputs hold."""
    known = _EXPORTED.setdefault(model, {})
    key = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
    if key not in known:
        known[key] = export(model, inputs)
    return known[key]


@functools.cache
def of_zoo(name: str, way: str = "export") -> Program:
    """A zoo model's Program, captured once; a test that edits it takes a copy."""
    model, inputs = zoo.ZOO[name].build()
    route, _, dynamic = way.partition("-")
    return {"dynamo": dynamo, "export": export}[route](model, inputs, bool(dynamic))


def arguments(program: Program, inputs: zoo.Inputs) -> list[object]:
    """A zoo model's inputs in the order of a Program's placeholders; sizes by position in the first input."""
    return [inputs[name] for name in program.input_names]
