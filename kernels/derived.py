"""What a kernel computes once from a weight: another layout of it, kept while the weight lives unchanged."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from thresher.graph.stamp import stamp

T = TypeVar("T")

_KEPT = WeakTensorKeyDictionary()
_LOCK = threading.Lock()


def derived(name: str, make: Callable[..., T], *weights: torch.Tensor) -> T:
    """`make(*weights)`, computed at the first call and again where a weight has another stamp.

    name: tells apart what several kernels derive from one weight. weights: the result lives as long as the
    first of them. What `thresher.graph.stamp` cannot see is missed, such as writes through `w.data.copy_(...)`.
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
        self._from = [(weakref.ref(w), stamp(w)) for w in weights]

    def is_of(self, weights: tuple[torch.Tensor, ...]) -> bool:
        return all(ref() is w and then == stamp(w) for (ref, then), w in zip(self._from, weights))
