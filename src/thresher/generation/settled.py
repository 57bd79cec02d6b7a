"""Whether a model is still what it was, told between two steps of one generation."""

from __future__ import annotations

import ctypes
import functools
import weakref
from array import array
from pathlib import Path
from typing import Any

import torch

from thresher.compat import tensor_handles
from thresher.graph.stamp import PLAIN
from thresher.hooks import HOOKS
from thresher.kernels import native


class Settled:
    """A model's weights, modules, hooks, attributes, lists and configurations' settings, as they were when this was made.

    plain: whether all weights are plain tensors in the main memory, and there are no hooks; of other models nothing is known
    here. Raises RuntimeError or OSError where C++ cannot be built.
    """

    def __init__(self, model: torch.nn.Module):
        modules = list(model.modules())
        held = [vars(m) for m in modules]
        tables = [h[name] for h in held for name in ("_parameters", "_buffers", "_modules")]
        hooks = [h[name] for h in held for name in HOOKS if name in h]
        configs = {id(v): v for h in held for v in h.values() if hasattr(v, "get_text_config")}
        settings = [vars(c) for c in configs.values()]
        lists = [v for one in (*held, *settings) for v in one.values() if type(v) is list]
        self._objects = _Objects([*tables, *hooks, *held, *settings], lists)
        tensors = {id(v): v for table in tables for v in table.values() if isinstance(v, torch.Tensor)}
        self.tensors = list(tensors.values())
        self.plain = not any(hooks) and all(
            type(t) in PLAIN and t.device.type == "cpu" and t.layout == torch.strided for t in self.tensors
        )
        self._places = _Places(self.tensors if self.plain else [])

    def unchanged(self) -> bool:
        """Whether all these are the same objects, and each weight lies where it lay, with its sizes and strides."""
        return self._objects.same() and self._places.same()


class _Objects:
    """What some dictionaries and lists hold."""

    def __init__(self, dictionaries: list[dict[str, Any]], lists: list[list[Any]]):
        self._kept = [*(list(d.values()) for d in dictionaries), *map(list, lists)]
        self._then = array("Q", [n for objects in self._kept for n in (len(objects), *map(id, objects))])
        self._given = dictionaries, lists
        self._at = [array("Q", map(id, objects)) for objects in self._given]
        first, second, then = (a.buffer_info()[0] for a in (*self._at, self._then))
        self._arguments = first, len(dictionaries), second, len(lists), then
        self._look = _library().same_objects

    def same(self) -> bool:
        return bool(self._look(*self._arguments))


class _Places:
    """Where tensors lie, and how."""

    def __init__(self, tensors: list[torch.Tensor]):
        self._then = array("q", [n for t in tensors for n in (t.data_ptr(), t.dim(), *t.shape, *t.stride())])
        self._handles = array("Q", tensor_handles(tensors))
        weakref.finalize(self, _drop, self._handles)
        given, then = self._handles.buffer_info()[0], self._then.buffer_info()[0]
        self._arguments = given, len(tensors), ctypes.addressof(_pytorch()[0]), then
        self._look = _library().same_tensors

    def same(self) -> bool:
        return bool(self._look(*self._arguments))


def _drop(handles: array[int]) -> None:
    for handle in handles:
        _pytorch()[1](handle)


@functools.cache
def _library() -> Any:
    # with Python's lock held all the while, which CDLL would give back
    library = ctypes.PyDLL(native.load("unchanged")._name)
    for name, numbers in (("same_objects", "pqpqp"), ("same_tensors", "pqpp")):
        kinds = {"p": ctypes.c_void_p, "q": ctypes.c_int64}
        getattr(library, name).argtypes = [kinds[n] for n in numbers]
    return library


@functools.cache
def _pytorch() -> tuple[Any, Any]:
    """Pointers to the functions of PyTorch's C interface that say how a tensor lies, and the one that ends a handle."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = ("data_ptr", "dim", "sizes", "strides")
    found = [ctypes.cast(getattr(library, f"aoti_torch_get_{name}"), ctypes.c_void_p) for name in names]
    drop = library.aoti_torch_delete_tensor_object
    drop.argtypes = [ctypes.c_void_p]
    return (ctypes.c_void_p * len(found))(*found), drop
