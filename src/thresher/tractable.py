"""Methods of models that torch cannot take into one graph, said in a form that it can. They compute the same, bit by bit.

Qwen3-VL adds vision features behind its first layers at `hidden[mask]`, whose size data decide: Dynamo cuts the language
model there into a graph for each layer, in which no method sees the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def add_at(hidden: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """hidden [B, n, d] with features [k, d] added at the k tokens that mask, bool [B, n], shows."""
    mask, features = (
        mask.to(hidden.device),
        features.to(hidden),
    )  # neither depends on a layer, so that a cut may gather them
    added = features.new_zeros(*mask.shape, features.shape[-1]).masked_scatter(mask[..., None], features)
    return hidden + added


_FORMS = {"_deepstack_process": add_at}


def parts_of(model: Any) -> list[tuple[torch.nn.Module, str]]:
    """The parts of a model with such methods, and the methods' names."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return [(part, name) for part in modules for name in _FORMS if hasattr(type(part), name)]


@contextlib.contextmanager
def tractable(parts: Sequence[tuple[torch.nn.Module, str]]) -> Iterator[None]:
    """Within the context these parts have methods that torch can take; others of their classes keep theirs."""
    for part, name in parts:
        part.__dict__[name] = _FORMS[name]
    try:
        yield
    finally:
        for part, name in parts:
            part.__dict__.pop(name, None)
