"""Runs transformers' `generate` with the compiled model in the model's place."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from thresher import at_hand, given_tokens, waiting
from thresher.errors import ArgumentError
from thresher.lowering.inductor.later import begin
from thresher.notices import warn

from . import windows
from .drafts import split
from .last_call import LastCall
from .padding import on_the_left
from .prefill import move, prompt_cache
from .programs import CACHES, cache_of, tokens_of
from .request import Request, check_model
from .steps import Steps

EAGER_PREFILL = (
    "generate makes its static cache during the prefill, which transformers does not compile, and this prefill is not one "
    "whole prompt of a decoder with attention in every layer and a mask of one row a sequence: that call runs as the model "
    "was written, padded. Later steps are compiled. Leave cache_implementation out to have the prefill compiled."
)

NOT_CALLED = (
    "generate of a {kind} calls another model than itself, so nothing of it ran compiled. Compile that one: of a model by "
    "PEFT, model.get_base_model(), which holds the adapters."
)


def generate(
    compiled: Any, model: Any, *args: Any, wait: bool = False, **kwargs: Any
) -> tuple[Any, LastCall]:
    """Run `model.generate` with the compiled model in the model's place; its result, and what was done.

    A prompt runs compiled over a cache that it hands back, in which tokens may be packed or left out, and what it holds
    moves into the one to generate with: a static one, or, behind a recipe that leaves tokens out or rounds them, one of
    ours (see `request`). Rows padded on the right are moved first (see `padding`).

    wait: compile each program before it runs first. Without, what a compiler needs seconds for runs node by node until it is
    compiled, in the background, once this call is done; `LastCall.early` counts such calls of the model.

    The model itself is not touched: `generate` runs on a stand-in that shares everything with it but `forward`. So several
    threads may generate with one model, and others call it, at the same time.

    Raises ArgumentError for what cannot work, before the first token.
    """
    check_model(model, kwargs)
    args, kwargs = on_the_left(model, args, kwargs)
    request = Request(model, getattr(compiled, "recipe", None), kwargs, args[0] if args else None)
    calls = _Calls(compiled, model, request)
    began, programs, early = time.perf_counter(), _programs(compiled), _early(compiled)
    with calls.standing_in() as stand_in, waiting.at_once(waiting.NO if wait else waiting.SOON):
        # on a GPU, transformers would have Inductor compile a decode step that calls the compiled model
        try:
            result = stand_in.generate(*args, **{"disable_compile": True, **request.options})
        except ArgumentError as refused:
            if calls.called or request.cache is None or refused.argument != "cache":
                raise
            raise _calls_another(model) from refused
    calls.steps.hand_back(request.given, cache_of(result) if isinstance(result, Mapping) else None)
    done = calls.done
    if not calls.called:
        warn(NOT_CALLED.format(kind=type(model).__name__), stacklevel=3)
    done.seconds = time.perf_counter() - began
    done.programs, done.early = _programs(compiled) - programs, _early(compiled) - early
    if done.early:
        begin()
    return result, done


def _calls_another(model: Any) -> ArgumentError:
    """Why a model whose `generate` hands its arguments to another one cannot have a cache of ours."""
    return ArgumentError(
        "model",
        f"a {type(model).__name__}, whose generate calls another model than itself",
        "a model that its own generate calls, with a recipe that shortens or rounds the cache",
        "Compile the one that it calls (such as its language_model), or leave transprune and zipvl out of the recipe.",
    )


def _programs(compiled: Any) -> int:
    return sum(s.programs for s in getattr(compiled, "sessions", ()))


def _early(compiled: Any) -> int:
    return sum(one.early for s in getattr(compiled, "sessions", ()) for one in s.later)


class _Calls:
    """The model's forward while it generates."""

    def __init__(self, compiled: Any, model: Any, request: Request):
        self.compiled, self.model, self.request = compiled, model, request
        self.done = LastCall([])
        self.written, self.called = model.forward, False
        # of the call that is prepared, before transformers widens it to the cache
        self.mask: torch.Tensor | None = None
        self.text = model.config.get_text_config(decoder=True)
        self.steps = Steps(compiled, model)

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[Any]:
        """The model with another `forward`, in an object of its own; what `generate` notes on it goes to the model."""
        model = self.model
        stand_in = _shared(model)
        prepare_inputs = stand_in.prepare_inputs_for_generation

        @functools.wraps(self.written)
        def forward(*inputs: Any, **named: Any) -> Any:
            return self.forward(*inputs, **named)

        @functools.wraps(prepare_inputs)
        def prepare(*inputs: Any, **named: Any) -> Any:
            self.mask = named.get("attention_mask")
            tokens = inputs[0] if inputs else tokens_of(named)
            if not self.done.tokens_in and isinstance(tokens, torch.Tensor):  # of the prompt
                self.request.keep_whole(cache_of(named), tokens.shape[1])
                self.steps.most = self.request.most(tokens.shape[1])
            return prepare_inputs(*inputs, **named)

        held = stand_in.__dict__
        held.update(forward=forward, prepare_inputs_for_generation=prepare)
        before, self.request.model = dict(held), stand_in
        try:
            yield stand_in
        finally:
            model.__dict__.update({k: v for k, v in held.items() if v is not before.get(k, before)})

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.called = True
        cache = cache_of(named)
        tokens = tokens_of(named)
        ours = self.request.cache is not None and cache is self.request.cache
        began = time.perf_counter()
        first = not self.done.tokens_in
        ran = {id(s): s.counters.calls for s in getattr(self.compiled, "sessions", ())} if first else {}
        if ours:
            with _lock_of(self.model):  # a step changes how the model attends
                if cache.get_seq_length():
                    out = self._step(inputs, named, tokens)
                elif tokens is not None and not inputs and (drafts := self.request.drafts(tokens)):
                    out = self._prompt_and_drafts(named, tokens, drafts)
                    tokens = tokens[:, :-drafts]
                else:
                    out = self._prompt(inputs, named, tokens)
        elif _is_empty_and_static(cache):
            out = self._static_prompt(inputs, named, cache)
        else:
            given = self._with_mask(named, cache, tokens)
            step = (
                not inputs and not first and tokens is not None and cache is not None and tokens.shape[1] == 1
            )
            out = self.steps(self._call, given) if step else self._call(*inputs, **given)
        seconds = time.perf_counter() - began
        if tokens is None:
            return out
        if first:
            all_sessions = getattr(self.compiled, "sessions", ())
            called = [s for s in all_sessions if s.counters.calls != ran.get(id(s), 0)]
            self._note(cache_of(named) if ours else cache_of(vars(out) | dict(out)), tokens, called)
            self.done.prefill_seconds = seconds
        else:
            self.done.step_seconds += seconds
            self.done.steps += 1
        self.done.new += tokens.shape[1] if not first else 1
        return out

    def _note(self, cache: Any, tokens: torch.Tensor, ran: list[Any]) -> None:
        real, length = self.mask, cache.get_seq_length() if cache is not None else tokens.shape[1]
        if real is None or tuple(real.shape) != (tokens.shape[0], length):
            real = torch.ones(tokens.shape[0], length, dtype=torch.bool, device=tokens.device)
        self.done.tokens_in = real.bool().sum(1).tolist()
        self.done.prompt(self.model, cache, real.bool(), ran)

    def _with_mask(self, named: dict[str, Any], cache: Any, tokens: Any) -> dict[str, Any]:
        """A call's arguments with a mask among them, so that one program serves rows with padding and without: a step
        always, a prompt where its program packs; without packing a prompt is faster for having none."""
        given = named.get("attention_mask")
        if given is not None or tokens is None or cache is None or self.model.config.is_encoder_decoder:
            return named
        seen = cache.get_seq_length()
        if not seen and not self.packs():
            return {**named, "attention_mask": None}
        mask = torch.ones(tokens.shape[0], seen + tokens.shape[1], dtype=torch.long, device=tokens.device)
        return {**named, "attention_mask": mask}

    def packs(self) -> bool:
        """Whether padded prompts are packed."""
        return any(s.program.packing is not None for s in getattr(self.compiled, "sessions", ()))

    def _call(self, *inputs: Any, **named: Any) -> Any:
        with at_hand.preferred():
            return self.compiled(*inputs, **named)

    def _prompt(self, inputs: tuple[Any, ...], named: dict[str, Any], tokens: Any) -> Any:
        """Run a prompt compiled, and give what it leaves to our cache."""
        name = next(name for name in CACHES if named.get(name) is not None)
        if inputs or tokens is None:
            raise ArgumentError(
                "inputs", "a prompt by position", "input_ids or inputs_embeds by name", "Name it."
            )
        with given_tokens.reading_kept():
            given = {**named, name: prompt_cache(self.model.config, named[name])}
            out = self._call(**self._with_mask(given, given[name], tokens))
        move(cache_of(out), named[name], tokens.shape[1])
        out["cache" if "cache" in out else name] = named[name]
        return out

    def _prompt_and_drafts(self, named: dict[str, Any], tokens: torch.Tensor, drafts: int) -> Any:
        """Run a prompt, and then the drafts that transformers put behind it: which of a prompt's tokens stay must not
        hang on what somebody guesses to come next."""
        prompt, behind = split(named, tokens.shape[1], drafts)
        first = self._prompt((), prompt, tokens[:, :-drafts])
        out = self._step((), behind, tokens[:, -drafts:])
        out["logits"] = torch.cat((first["logits"][:, -1:], out["logits"][:, -drafts:]), 1)
        return out

    def _step(self, inputs: tuple[Any, ...], named: dict[str, Any], tokens: Any) -> Any:
        """Run one token, or a later turn's, compiled over our cache."""
        from thresher.runtime.kv.cache import ATTENTION

        cache, given = cache_of(named), dict(named)
        length = cache.get_seq_length() + tokens.shape[1]
        if given.get("attention_mask") is None:  # one program for rows with padding and without
            given["attention_mask"] = torch.ones(
                tokens.shape[0], length, dtype=torch.long, device=tokens.device
            )
        before = self.text._attn_implementation
        self.text._attn_implementation = ATTENTION
        try:
            out = self._call(*inputs, **given)
        finally:
            self.text._attn_implementation = before
        cache.advance(tokens.shape[1], given["attention_mask"].bool())
        return out

    def _static_prompt(self, inputs: tuple[Any, ...], named: dict[str, Any], static: Any) -> Any:
        from transformers.cache_utils import DynamicCache, StaticLayer

        name = next(name for name in CACHES if named.get(name) is not None)
        layers = getattr(static, "layers", ())  # an encoder-decoder's cache has none of its own
        keys_and_values = bool(layers) and all(isinstance(layer, StaticLayer) for layer in layers)
        if inputs or not keys_and_values or not _one_prompt(named, self.mask):
            warn(EAGER_PREFILL)
            return self.written(*inputs, **named)
        full = all(
            type(layer) is StaticLayer for layer in layers
        )  # the cache that a prompt without a static one has
        handed = windows.whole(DynamicCache(config=self.model.config)) if full else DynamicCache()
        out = self._call(
            **self._with_mask({**named, name: handed, "attention_mask": self.mask}, handed, tokens_of(named))
        )
        for index, layer in enumerate(cache_of(out).layers):
            static.update(layer.keys, layer.values, index)
        out["cache" if "cache" in out else name] = static
        return out


def _shared(model: torch.nn.Module) -> Any:
    """Another object of the model's class that holds the very same parameters, sub-modules, hooks and attributes."""
    made = object.__new__(type(model))
    for name, held in model.__dict__.items():
        own = inspect.ismethod(held) and held.__self__ is model  # of this one model, whose class has another
        made.__dict__[name] = types.MethodType(held.__func__, made) if own else held
    return made


_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_NEW = threading.Lock()


def _lock_of(model: torch.nn.Module) -> threading.RLock:
    with _NEW:
        return _LOCKS.setdefault(model, threading.RLock())


def _is_empty_and_static(cache: Any) -> bool:
    """Whether a cache has a fixed size and does not hold its tensors yet; a decoder's own, where it has two."""
    cache = getattr(cache, "self_attention_cache", cache)
    return bool(getattr(cache, "is_compileable", False)) and not getattr(cache, "is_initialized", True)


def _one_prompt(named: dict[str, Any], mask: torch.Tensor | None) -> bool:
    """Whether a call is a whole prompt, with a mask [rows, tokens] or none."""
    tokens = tokens_of(named)
    return tokens is not None and (mask is None or mask.shape == tokens.shape[:2])
