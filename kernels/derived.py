"""What a kernel computes once from a weight: another layout of it, kept while the weight lives unchanged."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_KEPT = WeakTensorKeyDictionary()
_LOCK = threading.Lock()


def derived(name: str, make: Callable[..., T], *weights: torch.Tensor) -> T:
    """`make(*weights)`, computed at the first call and after the weights were written to in place.

    name: tells apart what several kernels derive from one weight. weights: the result lives as long as the
    first of them. Writes through `.data`, and to tensors made in inference mode, leave no trace and are missed.
    """
    with _LOCK:
        kept: dict[str, _Kept] = _KEPT.setdefault(weights[0], {})
        found = kept.get(name)
    if found is not None and found.is_of(weights):
        return found.value
    value = make(*weights)
    with _LOCK:
        kept[name] = _Kept(value, weights)
    return value


class _Kept:
    """A result, and which weights in which state it came from. Weak: an address may be used again."""

    def __init__(self, value: Any, weights: tuple[torch.Tensor, ...]):
        self.value = value
        self._from = [(weakref.ref(w), _writes(w)) for w in weights]

    def is_of(self, weights: tuple[torch.Tensor, ...]) -> bool:
        return all(ref() is w and writes == _writes(w) for (ref, writes), w in zip(self._from, weights))


def _writes(weight: torch.Tensor) -> int:
    return -1 if weight.is_inference() else weight._version
