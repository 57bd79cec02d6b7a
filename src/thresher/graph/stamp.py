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
    Not seen are writes through `p.data.copy_(...)`, and in place to a tensor made in inference mode: neither counts
    up a version. A tensor made of others, such as a DTensor, has the stamps of its parts behind its own.

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
        return tuple(stamp(getattr(tensor, name)) for name in names)
    if is_fake(tensor) or tensor.layout is not torch.strided:
        return ()
    return tensor.data_ptr(), tensor.stride()
