"""Notices what is set on layers after they were found alike: a short model has no part of most of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..hooks import HOOKS

_OWN_VALUES = ("_parameters", "_buffers")  # whose tensors each call reads as they are


class Watch:
    """What layers held when this was made: attributes, modules, hooks, and the names of their weights.

    Looking at one layer takes some ten microseconds. A change within an object that is no list is not seen.
    """

    def __init__(self, layers: Sequence[torch.nn.Module]):
        self._layers = [[_Held(m) for m in layer.modules()] for layer in layers]
        self._turn = 0

    def unchanged(self, all_layers: bool) -> bool:
        """Whether the layers are still what they were: all of them, or the one whose turn it is."""
        if all_layers:
            return all(held.same() for layer in self._layers for held in layer)
        self._turn = (self._turn + 1) % len(self._layers)
        return all(held.same() for held in self._layers[self._turn])


class _Held:
    """What one module holds. `training` is left out: a model in training is not run by a short one at all."""

    def __init__(self, module: torch.nn.Module):
        self._now = vars(module)
        self._modules = module._modules
        self._hooks = [self._now[name] for name in HOOKS if name in self._now]
        self._tables = [self._now[name] for name in _OWN_VALUES]
        self._then, self._lists, self._names = self._values(), self._contents(), self._weights()

    def same(self) -> bool:
        now = self._values()
        return (
            len(now) == len(self._then)
            and all(map(operator.is_, now, self._then))
            and not any(self._hooks)
            and self._lists == self._contents()
            and self._names == self._weights()
        )

    def _values(self) -> list[Any]:
        return [v for k, v in self._now.items() if k != "training"] + list(self._modules.values())

    def _weights(self) -> list[tuple[str, bool]]:
        return [(name, held is None) for table in self._tables for name, held in table.items()]

    def _contents(self) -> list[list[Any]]:
        return [list(v) for v in self._now.values() if type(v) is list]
