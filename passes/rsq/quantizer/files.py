"""Finished layers on disk, so that an interrupted quantization goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


class LayerFiles:
    """One safetensors file a layer in a folder. folder: None keeps nothing.

    stamp: identifies model, options and data; a file with another stamp is not read, and is overwritten.
    """

    def __init__(self, folder: Path | None, stamp: str):
        self.folder, self.stamp = folder, stamp

    def read(self, name: str) -> tuple[Tensors, Mapping[str, str]] | None:
        """(tensors, metadata) of a finished layer of this run, or None."""
        if self.folder is None or not self._path(self.folder, name).exists():
            return None
        with safe_open(str(self._path(self.folder, name)), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("stamp") != self.stamp:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Write a finished layer; an old file stays whole until the new one is complete."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.folder, name)
        partial = path.with_suffix(".partial")
        save_file(dict(tensors), str(partial), {**metadata, "stamp": self.stamp})
        partial.replace(path)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        return folder / f"{safe}.safetensors"


def stamp_of(fingerprint: str, options: str, inputs: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the source weights' fingerprint, the options and the calibration batches."""
    digest = hashlib.sha256(f"{fingerprint} {options}".encode())
    for named in inputs:
        for name, given in sorted(named.items()):
            digest.update(name.encode())
            if isinstance(given, torch.Tensor):
                plain = given.double() if given.is_floating_point() else given
                digest.update(plain.cpu().contiguous().numpy().tobytes())
            else:
                digest.update(repr(given).encode())
    return digest.hexdigest()[:16]
