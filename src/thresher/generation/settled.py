"""Whether a model is still what it was, told between two steps of one generation."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch

from thresher.graph.stamp import PLAIN
from thresher.hooks import HOOKS

_SHARE = 4000  # attributes that are looked at in one step; all weights, modules and hooks are at each


class Settled:
    """A model's weights, modules, hooks, attributes and configurations, as they were when this was made.

    Seen between two steps are, at once: weights replaced, moved, or viewed otherwise, modules replaced, hooks; within some
    steps of a large model, at once of a small one: attributes, lists, settings of a configuration. `untouched` tells all.
    """

    def __init__(self, model: torch.nn.Module):
        modules = list(model.modules())
        held = [vars(m) for m in modules]
        tables = [h[name] for h in held for name in ("_parameters", "_buffers", "_modules")]
        self._tables, self._empty = [t for t in tables if t], [t for t in tables if not t]
        self._hooks = [h[name] for h in held for name in HOOKS if name in h]
        configs = {id(v): v for h in held for v in h.values() if hasattr(v, "get_text_config")}
        self._configs = [vars(c) for c in configs.values()]
        self._parts: list[_Part] = []
        waiting: list[dict[str, Any]] = list(self._configs)
        count = 0
        for one in held:
            waiting.append(one)
            count += len(one)
            if count >= _SHARE:
                self._parts.append(_Part(waiting))
                waiting, count = [], 0
        self._parts.append(_Part(waiting))
        self._turn = 0
        self._then = self._within()
        tensors = {id(t): t for t in self._then if isinstance(t, torch.Tensor)}
        self.tensors = list(tensors.values())
        self._plain = all(type(t) in PLAIN and t.device.type == "cpu" for t in self.tensors)
        self._places = self._where() if self._plain else []

    @property
    def plain(self) -> bool:
        """Whether all weights are plain tensors in the main memory; of others nothing is known here."""
        return self._plain and not any(self._hooks)

    def unchanged(self) -> bool:
        """Whether nothing is seen to have changed, looking at one part of the attributes."""
        self._turn = (self._turn + 1) % len(self._parts)
        return self._same() and self._parts[self._turn].same()

    def untouched(self) -> bool:
        """Whether nothing is seen to have changed, looking at all."""
        return self._same() and all(part.same() for part in self._parts)

    def _same(self) -> bool:
        now = self._within()
        return (
            len(now) == len(self._then)
            and all(map(operator.is_, now, self._then))
            and not any(self._empty)
            and not any(self._hooks)
            and self._where() == self._places
        )

    def _within(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._tables)))

    def _where(self) -> list[Any]:
        tensors = self.tensors
        return [
            *map(torch.Tensor.data_ptr, tensors),
            *map(torch.Tensor.stride, tensors),
        ]


class _Part:
    """Some objects' attributes."""

    def __init__(self, held: list[dict[str, Any]]):
        self._held = held
        self._lists = [v for one in held for v in one.values() if type(v) is list]
        self._then = self._now()

    def same(self) -> bool:
        now = self._now()
        return len(now) == len(self._then) and all(map(operator.is_, now, self._then))

    def _now(self) -> list[Any]:
        return list(itertools.chain.from_iterable((*map(dict.values, self._held), *self._lists)))
