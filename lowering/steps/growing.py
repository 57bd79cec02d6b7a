"""Keys and values that a step adds one token to: they grow in memory with room behind, and none of them is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from thresher.graph.nodes import value

from .operations import CAT, Operation

_SLOTS = 2  # the dimension of tokens
_LEAST = 64  # slots of room, where nobody says how many will come


def grown(
    owns: Mapping[int, fx.Node], forms: Mapping[fx.Node, Operation], places: Sequence[fx.Node]
) -> dict[int, int]:
    """Results that are an input of four dimensions with more behind in the third, by number, with the input's.

    owns: the node that is each result. forms: nodes in C++. Nothing else in C++ reads such an input, whose strides may be
    any in the second dimension.
    """
    found: dict[int, int] = {}
    for where, node in owns.items():
        form = forms[node]
        first = form.reads[0]
        if form.code != CAT or not isinstance(first, fx.Node) or first.op != "placeholder":
            continue
        others = [u for u in first.users if u in forms and u is not node]
        one = sum(value(r).shape[_SLOTS] for r in form.reads[1:]) if value(first).dim() == 4 else None
        place = places.index(first)
        if form.sizes[0] in (_SLOTS, -2) and one == 1 and not others and place not in found.values():
            found[where] = place
    return found


class Room:
    """Memory for one input's slots, and some that come.

    view: the slots so far, as they were handed out last. Only who brings this very tensor goes on here; any other tensor is
    copied to new memory. So what was once handed out never changes, whoever holds it.
    """

    def __init__(self) -> None:
        self.view: torch.Tensor | None = None
        self.memory = torch.empty(0)
        self.slots = self.capacity = self.pointer = 0

    def holds(self, tensor: torch.Tensor, most: int | None) -> bool:
        """Make room for one slot behind `tensor`, [rows, heads, slots, width]; False where it lies as it lay.

        most: slots that may be wanted in the end, where that is known.
        """
        if tensor is self.view and self.slots < self.capacity:
            return False
        rows, heads, slots, width = tensor.shape
        self.capacity = max(2 * slots, slots + _LEAST)
        if most is not None:
            self.capacity = max(slots + 1, min(self.capacity, most))
        memory = torch.empty(rows, heads, self.capacity, width, dtype=tensor.dtype)
        memory[:, :, :slots] = tensor
        self.memory, self.slots, self.pointer = memory, slots, memory.data_ptr()
        self._rows, self._heads, self._width, self._strides = rows, heads, width, memory.stride()
        return True

    def next(self) -> torch.Tensor:
        """The slots so far and one more, which is yet to be written."""
        self.slots += 1
        size = (self._rows, self._heads, self.slots, self._width)
        self.view = self.memory.as_strided(size, self._strides)  # half the time of `narrow`
        return self.view
