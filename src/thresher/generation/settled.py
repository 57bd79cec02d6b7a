"""Whether a model is still what it was, told between two steps of one generation."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from thresher.graph.stamp import PLAIN
from thresher.hooks import HOOKS
from thresher.kernels import native

_LAYOUTS = 64  # weights whose strides are looked at in one step: few programs ever change them alone


class Settled:
    """A model's weights, modules, hooks, attributes, lists and configurations' settings, as they were when this was made.

    Seen between two steps are, at once: any of these replaced, added or taken away, and weights moved; within some steps: a
    weight viewed otherwise where it lies. `untouched` tells all. Raises RuntimeError or OSError where C++ cannot be built.
    """

    def __init__(self, model: torch.nn.Module):
        modules = list(model.modules())
        held = [vars(m) for m in modules]
        tables = [h[name] for h in held for name in ("_parameters", "_buffers", "_modules")]
        self._hooks = [h[name] for h in held for name in HOOKS if name in h]
        configs = {id(v): v for h in held for v in h.values() if hasattr(v, "get_text_config")}
        dictionaries = [*tables, *self._hooks, *held, *map(vars, configs.values())]
        lists = [v for one in (*held, *map(vars, configs.values())) for v in one.values() if type(v) is list]
        self._objects = _Objects(dictionaries, lists)
        tensors = {id(v): v for table in tables for v in table.values() if isinstance(v, torch.Tensor)}
        self.tensors = list(tensors.values())
        self._plain = all(type(t) in PLAIN and t.device.type == "cpu" for t in self.tensors)
        self._places, self._strides = (
            (self._where(), self._layouts(self.tensors)) if self._plain else ([], [])
        )
        self._turn = 0

    @property
    def plain(self) -> bool:
        """Whether all weights are plain tensors in the main memory; of others nothing is known here."""
        return self._plain and not any(self._hooks)

    def unchanged(self) -> bool:
        """Whether nothing is seen to have changed; of strides, some are looked at."""
        begin = self._turn
        end = begin + _LAYOUTS
        self._turn = end if end < len(self.tensors) else 0
        return self._same() and self._layouts(self.tensors[begin:end]) == self._strides[begin:end]

    def untouched(self) -> bool:
        """Whether nothing is seen to have changed, looking at all."""
        return self._same() and self._layouts(self.tensors) == self._strides

    def _same(self) -> bool:
        return self._objects.same() and self._where() == self._places

    def _where(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.tensors))

    @staticmethod
    def _layouts(tensors: Sequence[torch.Tensor]) -> list[Any]:
        return list(map(torch.Tensor.stride, tensors))


class _Objects:
    """What some dictionaries and lists hold."""

    def __init__(self, dictionaries: list[dict[str, Any]], lists: list[list[Any]]):
        self._kept = [*(list(d.values()) for d in dictionaries), *map(list, lists)]
        self._then = array("Q", [n for objects in self._kept for n in (len(objects), *map(id, objects))])
        self._given = dictionaries, lists
        self._at = [array("Q", map(id, objects)) for objects in self._given]
        first, second, then = (a.buffer_info()[0] for a in (*self._at, self._then))
        self._arguments = first, len(dictionaries), second, len(lists), then
        self._look = _look()

    def same(self) -> bool:
        return bool(self._look(*self._arguments))


@functools.cache
def _look() -> Any:
    # with Python's lock held all the while, which CDLL would give back
    function = ctypes.PyDLL(native.load("same_objects")._name).same_objects
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return function
