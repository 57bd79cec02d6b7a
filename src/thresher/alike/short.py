"""Calls of a model that run by its short copy: Dynamo sees few layers, and what it compiles computes all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ThresherError
from ..generation.programs import CACHES, cache_of
from ..graph.deepen import Unlike
from ..model_capture import unwrapped
from ..notices import disabled, logger
from ..recipe import Recipe
from ..tractable import parts_of
from . import depth
from .stack import KEPT, ShortModel, stack_of
from .watch import Watch

_CHOSEN_BY_CALL = {"transprune", "zipvl"}  # their layers need not hold the same tokens
_TARGETS = ("inductor", "reference")
_NAMES = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position",
          "return_dict", *CACHES}  # fmt: skip
_ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; wider for narrow types
_NARROW = 0.1
_ROWS = 2  # of a batch, that a model is asked for


class Short:
    """A model's short copy, compiled.

    compile: compiles a module, as Dynamo does. Calls must be asked for (`takes`) first.
    """

    def __init__(self, model: torch.nn.Module, short: ShortModel, compile: Callable[[torch.nn.Module], Any]):
        self.model, self.short = model, short
        self.layers = short.stack.layers
        self._call = compile(short.module)
        self._checked = False
        self._watch = Watch(short.stack.modules)

    @classmethod
    def of(
        cls, model: Any, recipe: Recipe, target: str, compile: Callable[[torch.nn.Module], Any]
    ) -> Short | None:
        """None for a model whose layers are few or not alike, and where each call may treat layers otherwise."""
        if target not in _TARGETS or disabled() or _CHOSEN_BY_CALL & {p.name for p in recipe.passes}:
            return None
        if "forward" in vars(model) or parts_of(model):
            return None
        stack = stack_of(model)
        return cls(model, ShortModel(model, stack), compile) if stack is not None else None

    def follow(self, named: Mapping[str, Any], look: bool = False) -> bool:
        """Whether the short copy is still what the model is, once it has taken over what was set on it. All layers are
        looked at before a prompt, or to `look`, and one of them, in turn, before a step."""
        ids = named.get("input_ids", named.get("inputs_embeds"))
        step = cache_of(named) is not None and isinstance(ids, torch.Tensor) and ids.shape[1:2] == (1,)
        return self.short.follow() and self._watch.unchanged(all_layers=look or not step)

    def takes(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        """Whether a call treats all layers alike, so that the short model's says it all."""
        config = self.model.config
        if args or not named.keys() <= _NAMES or self.model.training:
            return False
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return False
        if not named.get("return_dict", getattr(config, "return_dict", True)) or any(
            isinstance(v, Mapping) for v in named.values()
        ):
            return False
        cache = cache_of(named)
        return cache is None or self._takes_cache(cache)

    def _takes_cache(self, cache: Any) -> bool:
        from transformers import cache_utils as kinds

        layers = getattr(cache, "layers", None)
        if type(cache) not in (kinds.DynamicCache, kinds.StaticCache) or getattr(cache, "offloading", False):
            return False
        if not isinstance(layers, list) or len(layers) not in (0, self.layers.count):
            return False
        if not layers:
            return True
        if type(cache) is kinds.StaticCache and not layers[0].is_initialized:
            return False
        first = layers[KEPT - 1]
        plain = {k: v for k, v in vars(first).items() if not isinstance(v, torch.Tensor)}
        tensors = {k: v for k, v in vars(first).items() if isinstance(v, torch.Tensor)}
        for layer in layers:
            held = vars(layer)
            if type(layer) not in (kinds.DynamicLayer, kinds.StaticLayer) or len(held) != len(vars(first)):
                return False
            if any(held.get(k, self) != v for k, v in plain.items()):
                return False
            for name, tensor in tensors.items():
                other = held.get(name)
                if (
                    not isinstance(other, torch.Tensor)
                    or other.shape != tensor.shape
                    or other.dtype != tensor.dtype
                ):
                    return False
                if other.stride() != tensor.stride():
                    return False
        return True

    def __call__(self, **named: Any) -> Any:
        """Run a call. Raises Unlike, before anything is computed, where the layers turn out not to be alike."""
        cache = cache_of(named)
        given = dict(named)
        prompt = cache is None or not cache.layers or not cache.layers[0].is_initialized
        if cache is not None:
            view = copy.copy(cache)
            view.layers = cache.layers[:KEPT]
            given.update((name, view) for name in CACHES if named.get(name) is not None)
        check = prompt and not self._checked and not _is_mask_of_cache(named)
        before = [copy.copy(layer) for layer in cache.layers] if check and cache is not None else []
        call = depth.Depth(
            self.layers, self.short.stack.modules, cache.layers[KEPT:] if cache is not None else ()
        )
        with depth.within(call), unwrapped():
            result = self._call(**given)
        found = cache_of(dict(result))
        if found is not None:
            whole = cache if cache is not None else found
            if cache is not None:
                for name in set(CACHES).intersection(result.keys()):
                    result[name] = cache
            self._fill(whole, found, call)
        elif call.further:
            raise ThresherError("Further layers gave results that no cache takes.")
        if check:
            try:
                self._check(named, result)
            except Unlike:
                if cache is not None:
                    cache.layers[:] = before
                raise
        return result

    def _fill(self, whole: Any, short: Any, call: depth.Depth) -> None:
        """Give the further layers of a cache what their layers of the model computed."""
        like = short.layers[KEPT - 1]
        at = {id(r): i for i, r in enumerate(call.given)}
        places = {k: at[id(v)] for k, v in vars(like).items() if isinstance(v, torch.Tensor) and id(v) in at}
        order = sorted(set(places.values()))
        if len(call.further) != len(order) * len(self.layers.further):
            raise ThresherError(
                f"{len(self.layers.further)} further layers gave {len(call.further)} results, and each is to give "
                f"{len(order)}."
            )
        whole.layers[:KEPT] = short.layers
        for number, index in enumerate(self.layers.further):
            if index == len(whole.layers):
                whole.layers.append(copy.copy(like))
            held, mine = vars(whole.layers[index]), call.further[number * len(order) :]
            for name, known in vars(like).items():
                if name in places:
                    held[name] = mine[order.index(places[name])]
                elif not isinstance(known, torch.Tensor):
                    held[name] = known

    def _check(self, named: Mapping[str, Any], result: Any) -> None:
        """Once: the model itself must agree. What differs from layer to layer and shows nowhere, such as a branch on a
        layer's number, would show here. Raises Unlike."""
        self._checked = True
        apart = {k: _first_rows(v) for k, v in named.items() if k not in CACHES}
        with torch.no_grad():
            expected = self.model(**{**apart, "use_cache": False})
        name = "logits" if "logits" in result else "last_hidden_state"
        made, wanted = _first_rows(result[name]), expected[name]
        mask = apart.get("attention_mask")
        real = torch.ones(made.shape[:2], dtype=torch.bool, device=made.device)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            real = mask[:, mask.shape[1] - made.shape[1] :].bool()
        error = (
            (made.float() - wanted.float()).abs().amax(-1)[real].max() if real.any() else made.new_zeros(())
        )
        largest = wanted.float().abs().amax(-1)[real].max() if real.any() else made.new_ones(())
        allowed = _ALLOWED.get(wanted.dtype, _NARROW)
        if not float(error) <= allowed * float(largest):
            logger.info("%s: its layers are not alike after all.", type(self.model).__name__)
            raise Unlike(
                f"The program of all layers differs from the model by {float(error / largest):.1e} of the largest value."
            )


def _is_mask_of_cache(named: Mapping[str, Any]) -> bool:
    mask = named.get("attention_mask")
    return isinstance(mask, torch.Tensor) and mask.dim() != 2


def _first_rows(given: Any) -> Any:
    """The first rows of a batch's tensor, which do not depend on the others."""
    return given[:_ROWS] if isinstance(given, torch.Tensor) and given.dim() > 1 else given
