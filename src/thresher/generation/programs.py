"""How a call is handed to Dynamo, so that few programs serve all calls of a kind.

Rows, lengths and what caches hold are sizes that change from call to call. Each is marked as such before the first program
is made, also where it is one (which Dynamo would make a constant), and no two are taken for the same because they once were
equal. So one program serves any number of rows and any length: one for prompts with padding, one for those without, one for
steps of each kind of cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from thresher.compat import free_sizes, mark_sizes

# A model's inputs by name: [batch, tokens, ...], whatever stands before in models with positions on several axes.
_PER_TOKEN = tuple(
    before + name
    for before in ("", "decoder_")
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
) + ("token_type_ids", "mm_token_type_ids")
CACHES = ("cache", "past_key_values")
_STATIC = "_dynamo_static_input_type"


def cache_of(named: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments or results, or None. Results warn where they are asked for a name of before."""
    held = tuple(named)
    return next((named[name] for name in CACHES if name in held and named[name] is not None), None)


class Sizes:
    """The sizes that calls of one compiled model have had.

    dynamic: as in torch.compile. None: a program for exactly the first call's sizes, and for all others those that take
    any. True: those from the first call on. False: Dynamo makes a program for each.
    """

    def __init__(self, dynamic: bool | None):
        self.dynamic = dynamic
        self._first: tuple[dict[str, Any], list[tuple[int, ...]]] | None = None
        self._usual = False

    def give_up(self) -> bool:
        """Leave sizes to Dynamo from now on; False where they are already.

        For a model that Dynamo cuts in two: what the first part hands on is one row for all, and a free size of one
        cannot be told from a free number of rows where the second part brings both together.
        """
        if self._usual:
            return False
        self._usual = True
        return True

    @contextlib.contextmanager
    def prepared(self, args: tuple[Any, ...], named: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within the context these arguments may be given to programs made for other sizes; gives the keyword ones."""
        mine = _shapes(args, named)
        if self._first is None and mine is not None:
            self._first = mine, list(_held(named))
        if (
            self.dynamic is False
            or self._usual
            or mine is None
            or (self.dynamic is None and self._is_first(mine, named))
        ):
            yield named
            return
        with free_sizes(apart=_differ(named)):
            yield _prepared(named)

    def _is_first(self, mine: dict[str, Any], named: dict[str, Any]) -> bool:
        """Whether a call, of these shapes, is like the first; what its cache holds is only then looked at."""
        return self._first is not None and mine == self._first[0] and list(_held(named)) == self._first[1]


def _differ(named: Mapping[str, Any]) -> bool:
    """Whether sizes that are equal in this call may differ in the next.

    A prompt's mask is as wide as its tokens in every call, which packing must know, and a static cache's mask as wide as the
    cache. All others are wider than what stands beside them by chance.
    """
    mask = named.get("attention_mask")
    masks = mask.values() if isinstance(mask, Mapping) else (mask,)
    if any(isinstance(m, torch.Tensor) and m.dim() == 4 for m in masks):
        return False
    return any(True for _ in _held(named))


def _held(named: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Shapes of the keys that a call's cache holds; empty for a prompt's."""
    found = (getattr(layer, "keys", None) for layer in layers_of(cache_of(named)))
    return (tuple(keys.shape) for keys in found if keys is not None)


def _shapes(args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a call's programs may depend on, beside what its cache holds; None for a call that is not a transformer's, by
    names."""
    if args or not any(isinstance(named.get(name), torch.Tensor) for name in _PER_TOKEN):
        return None
    return {k: tuple(v.shape) if isinstance(v, torch.Tensor) else type(v) for k, v in named.items()}


def layers_of(cache: Any) -> list[Any]:
    """A cache's layers; of one with two parts, an encoder-decoder's, both's."""
    if cache is None:
        return []
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in (*parts, cache) for layer in getattr(part, "layers", ())]


def _prepared(named: dict[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments, laid out alike in every call and marked with the sizes that change."""
    given = dict(named)
    for name in _PER_TOKEN:
        tensor = given.get(name)
        if isinstance(tensor, Mapping):  # a mask for each kind of layer
            given[name] = {kind: _mask_of_cache(mask) for kind, mask in tensor.items()}
        if not isinstance(tensor, torch.Tensor):
            continue
        mask = name.endswith("attention_mask")
        if mask and tensor.dim() == 4:
            given[name] = _mask_of_cache(tensor)
            continue
        if not tensor.is_floating_point():
            given[name] = tensor = alike(tensor)
        if tensor.dim() >= 2:
            first = tensor.dim() - 2 if name.endswith("position_ids") else 0
            _mark(tensor, first, *((1,) if mask else _tokens(tensor, first + 1)))
    for layer in layers_of(cache_of(named)):
        _lay_out(layer)
    return given


def _mask_of_cache(mask: Any) -> Any:
    """A mask [batch, 1, queries, slots], as of a static cache, laid out and marked; anything else as it is."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return mask
    mask = mask if mask.is_floating_point() else alike(mask)
    _mark(mask, 0, 3, *_tokens(mask, 2))
    return mask


def lay_out(layer: Any) -> None:
    """Lay a cache layer's keys and values out in order."""
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and not tensor.is_contiguous():
            setattr(layer, name, tensor.contiguous())


def _lay_out(layer: Any) -> None:
    """Lay a cache layer's tensors out as any other call's."""
    lay_out(layer)
    keys = getattr(layer, "keys", None)
    if isinstance(keys, torch.Tensor) and keys.dim() == 4:
        for tensor in (keys, layer.values):
            # transformers marks a static cache's memory as one of a kind, which would be compiled for anew
            vars(tensor).pop(_STATIC, None)
            _mark(tensor, 0, 2)
        length = getattr(layer, "cumulative_length", None)
        if isinstance(length, torch.Tensor):
            vars(length).pop(_STATIC, None)
    clock = getattr(layer, "clock", None)  # of a MixedPrecisionCache
    if isinstance(clock, torch.Tensor):
        _mark(clock, 0)
        for pool in layer.pools:
            for tensor in pool[:-1]:
                _mark(tensor, 0, 2)
            _mark(pool[-1], 0)
        for tensor in (*layer.places, *([layer.tail_places] if layer.is_initialized else [])):
            _mark(tensor, 0, 1)
    for name in ("conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        for tensor in held.values() if isinstance(held, dict) else (held,):
            if isinstance(tensor, torch.Tensor) and tensor.dim():
                vars(tensor).pop(_STATIC, None)
                _mark(tensor, 0)


def _mark(tensor: torch.Tensor, *dims: int) -> None:
    """Mark sizes that change; all others are constant, which Dynamo might else doubt after calls of another kind."""
    mark_sizes(tensor, dims)


def _tokens(tensor: torch.Tensor, dim: int) -> tuple[int, ...]:
    """The dimension of tokens, if it changes: a step of one is a program of its own, which needs no causal mask."""
    return () if tensor.shape[dim] == 1 else (dim,)


def alike(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with the strides that its shape has when made anew: a slice with one row or column keeps others."""
    wanted, step = [], 1
    for size in reversed(tensor.shape):
        wanted.append(step)
        step *= max(size, 1)
    if list(tensor.stride()) == wanted[::-1] and not tensor._is_view():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def tokens_of(named: dict[str, Any]) -> torch.Tensor | None:
    """A call's tokens, as ids or as embeddings."""
    return named["input_ids"] if named.get("input_ids") is not None else named.get("inputs_embeds")
