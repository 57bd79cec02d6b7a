"""The sizes that a program's shapes are written in, read off its inputs at a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value


class Sizes:
    """The symbols of a program's shapes, each read off a placeholder at the call; they follow the inputs in the slots."""

    def __init__(self, places: Sequence[fx.Node]):
        self._first, self._sources = len(places), list[tuple[int, int]]()
        self._found: dict[Any, tuple[int, Any]] = {}
        for index, node in enumerate(places):
            known = value(node)
            if isinstance(known, torch.SymInt):
                self._note(known, index, -1)
            elif isinstance(known, torch.Tensor):
                for dim, size in enumerate(known.shape):
                    self._note(size, index, dim)

    def _note(self, size: Any, index: int, dim: int) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.expr not in self._found:
            self._found[size.node.expr] = (self._first + len(self._sources), size)
            self._sources.append((index, dim))

    def __len__(self) -> int:
        return len(self._sources)

    def slot(self, symbol: Any) -> tuple[int, Any]:
        """Where a symbol's value lies, and its SymInt. KeyError for one that only data decide."""
        return self._found[symbol]

    @property
    def symbols(self) -> list[Any]:
        """The symbols, in the order of `of`."""
        return list(self._found)

    def of(self, given: Sequence[Any]) -> list[int]:
        """The symbols' values, in the order of their slots, from a call's inputs."""
        return [given[index] if dim < 0 else given[index].shape[dim] for index, dim in self._sources]


def symbols_of(known: Any) -> set[Any]:
    """The symbols in the sizes, strides and offset of a fake tensor, in a symbolic number, or in a list of either."""
    if isinstance(known, torch.Tensor):
        found = set[Any]()
        for size in (*known.shape, *known.stride(), known.storage_offset()):
            found |= symbols_of(size)
        return found
    if isinstance(known, (list, tuple)):
        return set().union(*map(symbols_of, known))
    return (
        set(known.node.expr.free_symbols)
        if isinstance(known, (torch.SymInt, torch.SymFloat, torch.SymBool))
        else set()
    )
