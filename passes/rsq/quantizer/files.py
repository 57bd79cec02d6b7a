"""Finished layers on disk, so that an interrupted quantization goes on where it was.

A file holds one layer of one run: a stamp of the whole model, the options and the data says which run, and a hash
of its contents and its name that it is whole and the layer it is taken for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from thresher.compat import has_values
from thresher.errors import ThresherError
from thresher.graph.program import Program
from thresher.hashing import add_tensor, of_tensors
from thresher.reading import reading
from thresher.tensor_files import MappedFile, write_tensors

Tensors = dict[str, torch.Tensor]
_FIX = "Delete the file, and the layer is quantized anew."


class LayerFiles:
    """One safetensors file a layer in a folder. folder: None keeps nothing.

    stamp: identifies model, options and data; a file with another stamp is not read, and is overwritten.
    """

    def __init__(self, folder: Path | None, stamp: str):
        self.folder, self.stamp = folder, stamp

    def read(self, name: str) -> tuple[Tensors, Mapping[str, str]] | None:
        """(tensors, metadata) of a finished layer of this run, or None; the tensors are mapped, not loaded.

        Raises ThresherError for a damaged file.
        """
        if self.folder is None:
            return None
        path = self.path(name)
        with reading(path, f"the finished layer {name}", _FIX):
            if not path.exists():
                return None
            file = MappedFile(path, _FIX)
            metadata = file.metadata
            if metadata.get("stamp") != self.stamp:
                return None
            tensors = {key: file.tensor(key) for key in file.entries}
            if metadata.get("sha256") != _digest(name, tensors, metadata):
                raise ThresherError("it was changed since it was written, or is another layer's")
            return tensors, metadata

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Write a finished layer; an old file stays whole until the new one is complete."""
        if self.folder is None:
            return
        path = self.path(name)
        stamped = {**metadata, "stamp": self.stamp}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise ThresherError(f"{path} cannot be written: {reason}. Name another folder.") from None
        write_tensors(path, tensors, {**stamped, "sha256": _digest(name, tensors, stamped)})

    def path(self, name: str) -> Path:
        """Where a layer's file is; each name has a file of its own."""
        assert self.folder is not None
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        if safe != name:
            safe += "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.folder / f"{safe}.safetensors"


def discard(folder: Path) -> None:
    """Remove the layers' files of a folder, and the folder where nothing else is in it."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def by_site(flat: Tensors) -> dict[str, Tensors]:
    """A layer's tensors by linear, from their names `linear:part`."""
    found: dict[str, Tensors] = {}
    for key, tensor in flat.items():
        fqn, _, part = key.rpartition(":")
        found.setdefault(fqn, {})[part] = tensor
    return found


def _digest(name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    texts = [f"{k}={v}" for k, v in sorted(metadata.items()) if k != "sha256"]
    return of_tensors(tensors.items(), name, *texts)


def stamp_of(program: Program, options: str, inputs: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the program's graph and all of its weights, the options and the calibration batches.

    All, and not a sample: a layer of another model would be taken for this one's. Hashing reads a weight once,
    where quantizing reads it hundreds of times.
    """
    digest = hashlib.sha256(f"{program.fingerprint()} {options}".encode())
    for name, weight in sorted(program.weights.items()):
        digest.update(name.encode())
        if has_values(weight.tensor):
            add_tensor(digest, weight.tensor)
    for named in inputs:
        for name, given in sorted(named.items()):
            digest.update(name.encode())
            if isinstance(given, torch.Tensor):
                add_tensor(digest, given)
            else:
                digest.update(repr(given).encode())
    return digest.hexdigest()
