"""Calls under `torch.inference_mode` by the programs that were made for calls outside it.

Dynamo compiles for the kind of tensors it is given, and a tensor made under inference mode is of another kind. A model that
was compiled outside, as most are, would be captured, rewritten and proven again at its first call there, on whatever batch
that has. So the mode is left for the call, and such tensors are copied: ids, masks and images, which are small beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

_PLAIN = (torch.Tensor, int, float, bool, str, type(None))


@contextlib.contextmanager
def plain_mode(
    args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool = False
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Within the context inference mode is off; gives the arguments for it, and what was copied with its copies.

    What holds tensors of its own, such as a cache, may have been made under the mode and can be written to there alone: a
    call with one stays in it. whole: nothing in the arguments does.
    """
    plain = whole or all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves((args, kwargs)))
    if not torch.is_inference_mode_enabled() or not plain:
        yield args, kwargs, []
        return
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_inference():
            return tensor
        copies.append((tensor, tensor.clone()))
        return copies[-1][1]

    with torch.inference_mode(False), torch.no_grad():
        args, kwargs = pytree.tree_map_only(torch.Tensor, copied, (args, kwargs))
        yield args, kwargs, copies
