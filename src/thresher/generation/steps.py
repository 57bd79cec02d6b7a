"""Steps of one generation: the first goes by Dynamo, the others hand the C++ step its tensors themselves.

What Dynamo checks at every call (a model's attributes and hooks, the kind of cache, types, sizes) is checked here too, in a
tenth of the time: a step is bound to one cache and to a model that has stayed as it was. Whatever else a call brings goes by
Dynamo again, and the next step is bound anew. Keys and values grow in place (`lowering.steps.growing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from thresher import sessions
from thresher.compat import any_autocast, unchanged_state
from thresher.errors import ThresherError
from thresher.hooks import HOOKS
from thresher.kernels import native
from thresher.lowering.steps.bound import BoundStep, NotAlike
from thresher.notices import logger
from thresher.tractable import parts_of

from .programs import alike, cache_of, lay_out, layers_of
from .settled import Settled

_TRIES = 2  # steps of a generation that are looked at, where none could be bound


class _Unbound(Exception):
    """Why a step cannot be bound, as a sentence."""


class Steps:
    """The steps of one generation. compiled: called with what is no step that was bound. most: slots that a row may come to
    have, where that is known. bound: how many steps went by no Dynamo."""

    def __init__(self, compiled: Any, model: Any, most: int | None = None):
        self.compiled, self.model, self.most = compiled, model, most
        self.bound = 0
        self._step: _Bound | None = None
        self._tries = 0 if hasattr(compiled, "sessions") and not parts_of(model) else _TRIES
        if _wrapped(compiled):
            self._tries = _TRIES

    def __call__(self, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Run a step, given by name, of one token a row over a cache that holds some. call: runs it by Dynamo."""
        if self._step is not None:
            out = self._step(named)
            if out is not None:
                self.bound += 1
                return out
            self._step = None
            look = getattr(getattr(self.compiled, "_call", None), "look", None)
            if look is not None:
                look()
        if self._tries >= _TRIES or torch.is_inference_mode_enabled():
            return call(**named)
        missing = native.load_error("unchanged")
        if missing is not None:
            self._tries = _TRIES
            logger.info("%s: steps go by Dynamo: %s", type(self.model).__name__, missing)
            return call(**named)
        self._tries += 1
        before = _Before(self.model, named)
        with sessions.watch() as calls:
            out = call(**before.named)
        try:
            self._step = _Bound(self.compiled, calls, before, out, self.most)
            self._tries = 0
        except (_Unbound, ThresherError) as reason:
            logger.info("%s: steps go by Dynamo: %s", type(self.model).__name__, reason)
        return out

    def hand_back(self, *caches: Any) -> None:
        """Lay caches that others will read out as they expect it: without room behind."""
        for layer in (layer for cache in caches if self.bound for layer in layers_of(cache)):
            lay_out(layer)


def _wrapped(compiled: Any) -> bool:
    """Whether a call of the compiled model runs something else beside it."""
    held = vars(compiled)
    return "forward" in held or any(held.get(name) for name in HOOKS)


class _Before:
    """A call before it is made. named: its arguments, laid out as Dynamo is given them."""

    def __init__(self, model: Any, named: Mapping[str, Any]):
        self.cache = cache_of(named)
        self.named = {k: _each(v, alike) for k, v in named.items()}
        for layer in layers_of(self.cache):
            lay_out(layer)
        self.layers = [dict(vars(layer)) for layer in layers_of(self.cache)]
        self.facts = _facts(self.cache)
        self.settled = Settled(model)


def _each(given: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(given, Mapping):
        return {k: _each(v, change) for k, v in given.items()}
    return change(given) if isinstance(given, torch.Tensor) and not given.is_floating_point() else given


def _tensors(named: Mapping[str, Any]) -> Iterator[tuple[tuple[str, Any], torch.Tensor]]:
    for name, given in named.items():
        if isinstance(given, torch.Tensor):
            yield (name, None), given
        elif isinstance(given, Mapping):
            yield from (((name, key), v) for key, v in given.items() if isinstance(v, torch.Tensor))


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.device, tensor.shape[:1]


def _facts(cache: Any) -> list[Any]:
    """What a cache is, but for what its layers hold."""
    own = [v for k, v in vars(cache).items() if k != "layers"]
    return [*own, *cache.layers] if isinstance(getattr(cache, "layers", None), list) else [*own, None]


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(a is b for a, b in zip(now, then))


class _Bound:
    """A step that was made once by Dynamo, and from then on is one call of C++."""

    def __init__(self, compiled: Any, calls: list[Any], before: _Before, out: Any, most: int | None):
        if len(calls) != 1:
            raise _Unbound(f"A step ran {len(calls)} graphs.")
        call = calls[0]
        session = call.session
        found = session.step() if hasattr(session, "step") else None
        if found is None:
            raise _Unbound("It is not run in C++.")
        step, weights, self._fresh = found
        self._session, self._sizes, self._cache = session, call.sizes, before.cache
        self._compiled = compiled
        self._origins(call, before)
        self._fields(call, before, out)
        if not self._sizes.hold(call.inputs):
            raise _Unbound("It is not known for which sizes its graph is.")
        if not before.settled.plain or not before.settled.unchanged():
            raise _Unbound(
                "The model is changed by its calls, or has hooks or weights that are no plain tensors."
            )
        live, sources = session.live(weights, call.weights)
        if sources:
            raise _Unbound(
                "It reads weights that are computed from others, which each call may have to do anew."
            )
        own = {id(t) for t in before.settled.tensors}
        if not own.issuperset(map(id, call.weights.values())):
            raise _Unbound("Its graph reads weights that are not the model's.")
        self._settled = before.settled
        self._state = unchanged_state()
        self._count = len(call.inputs)
        self._run = BoundStep(step, [*call.inputs, *live], self._count, most)
        self._updates = session.program.updates.keys()

    def _origins(self, call: Any, before: _Before) -> None:
        """Where each of the graph's inputs is found in a later call."""
        places: dict[int, Any] = {}
        for place, tensor in _tensors(before.named):
            if id(tensor) in places:
                raise _Unbound("A tensor is given twice.")
            places[id(tensor)] = place
        for number, held in enumerate(before.layers):
            for name, tensor in held.items():
                if isinstance(tensor, torch.Tensor):
                    if id(tensor) in places:
                        raise _Unbound("Layers of a cache share tensors.")
                    places[id(tensor)] = number, name
        self._of_call: list[tuple[int, str, Any]] = []
        self._of_cache: list[tuple[int, dict[str, Any], str]] = []
        numbers = self._sizes.numbers()
        layers = [vars(layer) for layer in layers_of(self._cache)]
        self._numbers = []
        for index, given in enumerate(call.inputs):
            if not isinstance(given, torch.Tensor):
                if index not in numbers:
                    raise _Unbound("It reads a number.")
                size = numbers[index]
                if size is not None:  # else it is as it was: what is no tensor is looked at
                    self._numbers.append((index, *size))
                continue
            found = places.get(id(given))
            if found is None:
                raise _Unbound("It reads a tensor that is neither an argument nor of the cache.")
            if isinstance(found[0], int):
                self._of_cache.append((index, layers[found[0]], found[1]))
            else:
                self._of_call.append((index, *found))
        self._given = {place: _kind(t) for place, t in _tensors(before.named)}
        self._plain = {k: v for k, v in before.named.items() if not isinstance(v, (torch.Tensor, Mapping))}

    def _fields(self, call: Any, before: _Before, out: Any) -> None:
        """Where each of the graph's results goes."""
        if not isinstance(out, Mapping) or not _same(_facts(self._cache), before.facts):
            raise _Unbound("Its output is no mapping, or its cache became another.")
        at = {id(r): i for i, r in enumerate(call.results) if isinstance(r, torch.Tensor)}
        self._output: Any = type(out)
        self._out: list[tuple[str, int]] = []
        for name, result in out.items():
            if result is not self._cache and id(result) not in at:
                raise _Unbound(f"Its output's {name} is no result of its graph.")
            self._out.append((name, -1 if result is self._cache else at[id(result)]))
        self._stored: list[tuple[dict[str, Any], str, int]] = []
        self._layers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for layer, then in zip(layers_of(self._cache), before.layers):
            now = vars(layer)
            if now.keys() != then.keys():
                raise _Unbound("A layer of its cache came to hold something else.")
            for name, known in now.items():
                if isinstance(known, torch.Tensor) and id(known) in at:
                    self._stored.append((now, name, at[id(known)]))
                elif known is not then[name] and (isinstance(known, torch.Tensor) or known != then[name]):
                    raise _Unbound(f"A layer of its cache changes its {name}.")
            self._layers.append((now, {k: v for k, v in now.items() if not isinstance(v, torch.Tensor)}))
        self._facts = _facts(self._cache)

    def __call__(self, named: dict[str, Any]) -> Any:
        """The model's output; None for a call that this step is not bound to."""
        given = self._run.given
        if not self._takes(named):
            return None
        for index, name, key in self._of_call:
            tensor = named[name]
            given[index] = tensor if key is None else tensor[key]
        for index, held, name in self._of_cache:
            given[index] = held[name]
        for index, which, dim in self._numbers:
            given[index] = given[which].shape[dim]
        if not self._sizes.hold(given[: self._count]):
            return None
        try:
            with torch.no_grad():
                results = self._run()
        except NotAlike:
            return None
        if self._updates:
            results = [r for i, r in enumerate(results) if i not in self._updates]
        self._session.count()
        for held, name, index in self._stored:
            held[name] = results[index]
        return self._output(**{k: self._cache if i < 0 else results[i] for k, i in self._out})

    def _takes(self, named: dict[str, Any]) -> bool:
        """Whether a call is like the one that was bound, but for the tensors' values and lengths."""
        if cache_of(named) is not self._cache or not _same(_facts(self._cache), self._facts):
            return False
        count = 0
        for place, tensor in _tensors(named):
            if self._given.get(place) != _kind(tensor):
                return False
            count += 1
        if count != len(self._given):
            return False
        for name, plain in self._plain.items():
            other = named.get(name, self)
            if other is not plain and (type(other) is not type(plain) or other != plain):
                return False
        for held, plain in self._layers:
            for name, value in plain.items():
                if held.get(name, self) is not value:
                    return False
        if any_autocast() or torch.is_inference_mode_enabled() or _wrapped(self._compiled):
            return False
        return self._state() and not self._fresh.due() and self._settled.unchanged()
