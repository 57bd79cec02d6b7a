"""Methods of models that torch cannot take into one graph, said in a form that it can. They compute the same, bit by bit.

Qwen3-VL adds vision features behind its first layers at `hidden[mask]`, whose size data decide: Dynamo cuts the language
model there into a graph for each layer, in which no method sees the whole. Rotary positions of the kind `dynamic` ask in
Python whether a call is longer than all before it, which cuts every model that has them.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import dynamic_rope


def add_at(hidden: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """hidden [B, n, d] with features [k, d] added at the k tokens that mask, bool [B, n], shows."""
    mask, features = (
        mask.to(hidden.device),
        features.to(hidden),
    )  # neither depends on a layer, so that a cut may gather them
    added = features.new_zeros(*mask.shape, features.shape[-1]).masked_scatter(mask[..., None], features)
    return hidden + added


_Form = tuple[torch.nn.Module, str, Callable[..., Any]]
_lock = threading.Lock()
_inside: Counter[tuple[int, str]] = Counter()  # calls within the context, by part and method


def parts_of(model: Any) -> list[_Form]:
    """The parts of a model with such methods, the methods' names, and what stands in for them."""
    found: list[_Form] = []
    for part in model.modules() if isinstance(model, torch.nn.Module) else ():
        if hasattr(type(part), "_deepstack_process"):
            found.append((part, "_deepstack_process", add_at))
        if dynamic_rope.is_dynamic(part):
            found.append((part, "forward", types.MethodType(dynamic_rope.rotate, part)))
    return found


@contextlib.contextmanager
def tractable(parts: Sequence[_Form]) -> Iterator[None]:
    """Within the context these parts have methods that torch can take; others of their classes keep theirs.

    Several threads may be inside at once: the last one out gives the methods back.
    """
    with _lock:
        for part, name, form in parts:
            if name == "forward":
                dynamic_rope.prepare(part)
            _inside[id(part), name] += 1
            part.__dict__.setdefault(name, form)
    try:
        yield
    finally:
        with _lock:
            for part, name, _ in parts:
                _inside[id(part), name] -= 1
                if not _inside[id(part), name]:
                    del _inside[id(part), name]
                    part.__dict__.pop(name, None)
