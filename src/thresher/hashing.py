"""A hash of tensors' whole contents, for files that must hold what they are taken for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from .tensor_files import release

_PIECE = 1 << 23  # elements brought to the main memory at a time


def add_tensor(digest: Any, tensor: torch.Tensor) -> None:
    """Add a tensor's dtype, shape and bytes to a hash, a piece at a time."""
    tensor = tensor.detach()
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}:".encode())
    if not tensor.numel():
        return
    flat = tensor.contiguous().reshape(-1)
    for piece in flat.split(_PIECE):
        digest.update(memoryview(piece.cpu().view(torch.uint8).numpy()))  # type: ignore[arg-type]
        release()  # of a mapped tensor no more than a piece is held


def of_tensors(named: Iterable[tuple[str, torch.Tensor]], *texts: str) -> str:
    """SHA-256 of texts and of tensors with their names, in the order of the names; 64 hex digits."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{len(name)}:{name}".encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()
