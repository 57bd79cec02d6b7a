"""What the calibration batches carry from one group of linears to the next, in memory or on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from thresher import tensor_files
from thresher.errors import ArgumentError
from thresher.machine.devices import bf16_products

Values = dict[fx.Node, Any]
_SMALL = 1 << 16  # bytes: what stays in memory whatever was asked for


class States:
    """Values by node for each batch.

    folder: where the large ones are kept, a file a batch, until `close`; None for memory. dtype: what tokens' features
    are rounded to while they wait (`narrow`), None for as they are computed. width: features of a hidden state; what is
    narrower, such as rotary tables and masks, is never rounded. name: of the folder of files.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype | None, width: int, name: str = "activations"):
        self.folder, self.dtype, self.width = None if folder is None else folder / name, dtype, width
        self._held: list[Values] = []
        self._files: dict[int, tensor_files.MappedFile] = {}
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # an interrupted run's

    def start(self, batches: Iterable[Values]) -> None:
        """Take every batch's first values."""
        for values in batches:
            self._held.append({})
            self[len(self._held) - 1] = values

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Values:
        """A batch's values, each in the dtype it was computed in."""
        file = self._files.get(index)
        found: Values = {}
        for node, held in self._held[index].items():
            if isinstance(held, _OnDisk):
                assert file is not None
                held = file.tensor(node.name)
            found[node] = held.to(_computed(node)) if self._waits_narrow(node, held) else held
        return found

    def __setitem__(self, index: int, values: Values) -> None:
        kept: Values = {}
        large: dict[str, torch.Tensor] = {}
        for node, given in values.items():
            if isinstance(given, torch.Tensor):
                # A view keeps all of what it shows a part of, and an expanded one is smaller than it looks.
                own = given.untyped_storage().nbytes() <= given.numel() * given.element_size()
                if self._narrows(node, given):
                    given = given.to(self.dtype)
                if self.folder is not None and own and given.numel() * given.element_size() >= _SMALL:
                    large[node.name] = given
                    kept[node] = _OnDisk()
                    continue
            kept[node] = given
        self._held[index] = kept
        if large and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{index}.safetensors"
            shapes = [(name, t.dtype, t.shape) for name, t in large.items()]
            tensor_files.write(path, shapes, large.__getitem__, {})
            self._files[index] = tensor_files.MappedFile(path)
        else:
            self._files.pop(index, None)

    def close(self) -> None:
        """Forget all values, and remove the files."""
        self._held.clear()
        self._files.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _narrows(self, node: fx.Node, given: torch.Tensor) -> bool:
        return (
            self.dtype is not None
            and given.is_floating_point()
            and given.dtype == _computed(node)
            and given.element_size() > self.dtype.itemsize
            and given.dim() in (2, 3)
            and given.shape[-1] >= self.width
        )

    def _waits_narrow(self, node: fx.Node, held: Any) -> bool:
        return isinstance(held, torch.Tensor) and held.dtype == self.dtype and held.dtype != _computed(node)


@dataclass(frozen=True)
class Keeping:
    """Where a run keeps what it has.

    folder: of finished layers, and of activations on disk; None for memory alone. activations: "memory" or "disk".
    narrow: round activations to this dtype while they wait, and where this CPU multiplies it in hardware what linears
    multiply too. files: by a weight's name, the file it came from.
    """

    folder: Path | None = None
    activations: str = "memory"
    narrow: torch.dtype | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> str:
        """What of this decides codes, in words; files of a run with others are not taken for this one's."""
        return f" {self.narrow} {self.multiplied}" if self.narrow else ""

    @property
    def multiplied(self) -> torch.dtype | None:
        """What linears of wider types are rounded to; None where that is no faster here."""
        return self.narrow if self.narrow == torch.bfloat16 and bf16_products() else None


class _OnDisk:
    """Stands for a value that the batch's file holds."""


def _computed(node: fx.Node) -> torch.dtype | None:
    known = node.meta.get("val")
    return known.dtype if isinstance(known, torch.Tensor) else None


PLACES = ("memory", "disk")


def check_place(place: str) -> None:
    """Raise ArgumentError unless it is one that activations can wait in."""
    if place not in PLACES:
        raise ArgumentError("activations", repr(place), ", ".join(PLACES), "Choose one of those.")
