"""Several processes that quantize one model together: each runs a share of the calibration batches, and rounds a share of
the rows.

What a step gathers is summed over the ranks, what they round is put together on all of them, and an error of one is
raised on all: a rank that stopped alone would leave the others waiting. All ranks must be given the same model, data and
options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from thresher.errors import ThresherError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """rank: this process's number of `size`. group: of torch.distributed; None for one process alone."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @staticmethod
    def of(group: Any) -> Ranks:
        """The ranks of a process group that this process is in; alone for None, and for a group of one."""
        if group is None or dist.get_world_size(group) == 1:
            return Ranks()
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once, such as writing files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks have: every size-th item."""
        return list(items[self.rank :: self.size])

    def sum(self, *tensors: torch.Tensor) -> None:
        """Put the sum over all ranks into each tensor."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def gather(self, item: T) -> list[T]:
        """What each rank has, in order, on all of them."""
        if self.size == 1:
            return [item]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self.group)
        return found

    def interleaved(self, items: list[T]) -> list[T]:
        """`share` undone: every rank's items, in the order that they were shared in."""
        parts = self.gather(items)
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def together(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`, which all ranks do; an error of Thresher's on any of them is raised on all."""
        if self.size == 1:
            return work()
        made: Any = None
        failed: ThresherError | None = None
        try:
            made = work()
        except ThresherError as error:
            failed = error
        said = self.gather(None if failed is None else (type(failed), str(failed)))
        if failed is not None:
            raise failed
        first = next(((rank, *s) for rank, s in enumerate(said) if s is not None), None)
        if first is not None:
            rank, kind, text = first
            raise _as(kind, f"rank {rank}: {text}")
        return made

    def once(self, work: Callable[[], T]) -> T:
        """The first rank's result of `work`, on all ranks; so is its error."""
        return self.gather(self.together(lambda: work() if self.leads else None))[0]  # type: ignore[return-value]


ALONE = Ranks()


def _as(kind: type[ThresherError], text: str) -> ThresherError:
    """An error of that kind with a text that stands as it is."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error
