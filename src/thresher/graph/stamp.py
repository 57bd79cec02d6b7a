"""Whether a tensor is still the one, and as it was, when something was computed from it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from thresher.compat import is_fake

Stamp = tuple[Any, ...]
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def stamp(tensor: torch.Tensor) -> Stamp:
    """Equal for two calls if and only if nothing that can be seen happened to `tensor` in between.

    Seen are another object, writes in place (`copy_`, an optimizer's step), a new storage behind the same object
    (`p.data = ...`, `set_`, `swap_tensors`, a move to another device or dtype) and another view of the same storage.
    Not seen are writes through `p.data.copy_(...)`, for which there is `Sample`, and in place to a tensor made in
    inference mode: neither counts up a version. A tensor made of others, such as a DTensor, has the stamps of its
    parts behind its own.

    Holds `id(tensor)`, so keep the tensor (or a weak reference) beside its stamp: an id is used again later.
    """
    # inference tensors count no writes; every call of a model asks this for every packed weight, so it is short
    version = -1 if tensor.is_inference() else tensor._version
    if type(tensor) in PLAIN and tensor.layout is torch.strided:
        return id(tensor), version, tensor.data_ptr(), tensor.stride(), tensor.dtype
    return id(tensor), version, *_parts(tensor), tensor.dtype


def _parts(tensor: torch.Tensor) -> Stamp:
    """What says where the values of an unusual tensor lie: its parts' stamps, or its address if it has one."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = (getattr(tensor, name) for name in names)  # not all are tensors: a DTensor has its mesh too
        return tuple(stamp(p) if isinstance(p, torch.Tensor) else id(p) for p in parts)
    if is_fake(tensor) or tensor.layout is not torch.strided:
        return ()
    return tensor.data_ptr(), tensor.stride()


_SAMPLED = 64


class Sample:
    """Some of a tensor's values, spread over all of it, to notice what no stamp sees: a write through `p.data`.

    Only tensors in the main memory are looked at: asking a GPU would wait for all it has to do. Takes some
    microseconds, whatever the tensor's size; a write to few of its elements may go unseen.
    """

    def __init__(self, tensor: torch.Tensor):
        self._view = _spread(tensor)
        self._bytes = self._read()

    def changed(self) -> bool:
        """Whether the values differ from those when this was made."""
        return self._view is not None and self._read() != self._bytes

    def _read(self) -> bytes:
        if self._view is None:
            return b""
        return self._view.contiguous().view(torch.uint8).numpy().tobytes()


def _spread(tensor: torch.Tensor) -> torch.Tensor | None:
    """A view of up to 2 * 64 values of a plain CPU tensor, one after the other in memory order; None for others."""
    plain = type(tensor) in PLAIN and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or not tensor.numel():
        return None
    flat = tensor.detach()
    strides = flat.stride()
    flat = flat.permute(sorted(range(flat.dim()), key=lambda d: -strides[d]))
    if not flat.is_contiguous():  # part of a larger tensor: its first rows
        flat = flat[(0,) * (flat.dim() - 1)][:_SAMPLED]
        return flat if flat.is_contiguous() else None
    flat = flat.view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)]
