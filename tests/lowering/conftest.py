"""torch's exporter reads the sources of five hundred functions at each export: once is enough for all tests."""

import copy
import functools

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_registry():
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry
    made = functools.cache(registry.from_torchlib)

    @classmethod
    def from_torchlib(cls, *args, **kwargs):
        found = copy.copy(made(*args, **kwargs))
        found.functions = {name: list(forms) for name, forms in found.functions.items()}
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(registry, "from_torchlib", from_torchlib)
    yield
    patch.undo()
