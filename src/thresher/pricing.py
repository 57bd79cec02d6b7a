"""What an operator says about its cost: a price from sizes, and how its speed is measured on a machine.

    def _price(model, node):                    # beside the operator's definition
        x, weight = node.args[:2]
        rows = model.numel(x) / model.size(value(x).shape[-1])
        return model.linear(rows, model.numel(weight), dtype_of(x), "my_linear.4", bits=4.5)

`model` is the cost model of `thresher.passes.cost`; an operator knows of it what `Prices` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from thresher.graph.nodes import value

if TYPE_CHECKING:
    from .machine.devices import Device

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1}
"""Bytes of a number, by dtype."""


@dataclass(frozen=True)
class Work:
    """What one operator does. flops: multiply-adds times two. bytes: weights and operands it must read and
    write. launches: calls that no compiler can fuse away. elements: of fused elementwise code."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    elements: float = 0.0


class Prices(Protocol):
    """What a price is computed from. All results are seconds on `device`.

    lengths: real tokens of each row of the batch, for packed programs; None counts every position as real.
    """

    device: Device
    lengths: Sequence[int] | None

    def size(self, size: Any) -> int:
        """A size of a graph as a number."""
        ...

    def numel(self, node: Any) -> float:
        """How many numbers a graph argument holds; 0 where it is no tensor."""
        ...

    def work(self, work: Work, dtype: str = "float32") -> float:
        """The roof over some work: the longer of its multiplications and its traffic, and what calls cost."""
        ...

    def linear(
        self, rows: float, weights: float, dtype: str, kernel: str = "linear", bits: float = 0.0
    ) -> float:
        """A multiplication of `rows` rows by a weight of that many numbers. kernel: a class of measured times, such
        as "wna16_linear.4". bits: stored for each weight, 0 for the dtype's."""
        ...

    def attention(
        self, flops: float, length: float, head_dim: float, dtype: str, moved: float, packed: bool
    ) -> float:
        """An attention. length: keys that a query sees, mean. moved: bytes of q, k, v and result."""
        ...


Price = Callable[[Prices, fx.Node], float]
"""Seconds of one call of an operator, from the sizes in the graph."""


@dataclass(frozen=True)
class LinearRate:
    """How `thresher doctor --calibrate` times a linear over weights of the operator's own format.

    kernel: the class under which `Prices.linear` finds the times. weight: tensors of a square weight of `side` by
    `side`. run: the call, given activations fp32 [rows, side] and such tensors.
    """

    kernel: str
    weight: Callable[[int], tuple[torch.Tensor, ...]]
    run: Callable[..., Any]


@dataclass(frozen=True)
class AttentionRate:
    """The same for an attention. kernel: as `Prices.attention` asks for it. call: for a length of sequences and a
    width of heads, a call without arguments and how many FLOPs it does."""

    kernel: str
    call: Callable[[int, int], tuple[Callable[[], Any], float]]


Rate = LinearRate | AttentionRate


def dtype_of(node: Any) -> str:
    """The dtype of a graph argument by name; "float32" where it is no tensor."""
    known = value(node)
    return str(known.dtype).removeprefix("torch.") if isinstance(known, torch.Tensor) else "float32"


def width_of(node: Any) -> int:
    """Bytes of one number of a graph argument."""
    return WIDTH.get(dtype_of(node), 4)
