"""A compiled model: what `thresher.compile` returns."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from thresher.runtime.session import Counters, Session

from . import backend, given_tokens, phases, prompt_tokens, sessions
from .alike import ByLayers
from .compat import isolated, room_for_graphs, tracing
from .errors import ArgumentError, ThresherError
from .generation.last_call import LastCall
from .generation.programs import Sizes, cache_of
from .generation.run import generate
from .model_capture import specialized_floats, unwrapped
from .notices import disabled, logger, warn
from .plain_mode import plain_mode
from .recipe import Recipe
from .records.certificate import Certificate
from .report import Report
from .tractable import parts_of, tractable
from .undone import rewrote_nothing

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs")  # fmt: skip
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks",
           "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip
# What a library that wraps a module's forward (accelerate) sets on it is about the compiled one.
_WRAPPERS = ("forward", "_original_forward", "_old_forward", "_hf_hook")


class Compiled(torch.nn.Module):
    """A compiled model, which stands where the model stood. Call it as the model; it records no gradients.

    model, recipe: what was compiled and how; the weights are the model's own, not copies. sessions: what runs its graphs.
    last_call: what the last `generate` did, a `LastCall`; None before.

    It is a module with the model's parameters, sub-modules, state dict and attributes, and an instance of its
    class: setting an attribute sets the model's, and a method of the model's class runs with the compiled model as
    `self`, so that what calls the model calls the compiled one. Hooks are its own and run around a call. Moved
    or cast (`to`, `half`), it compiles again when it is next called, and so does a copy, or one read from a pickle
    (of the model, the recipe and the hooks).
    """

    last_call: LastCall | None

    def __new__(cls, model: torch.nn.Module, *_: Any, **__: Any) -> Compiled:
        return super().__new__(_of(model.forward.__func__) if inspect.ismethod(model.forward) else cls)

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Recipe,
        *,
        dynamic: bool | None = None,
        mode: str | None = None,
        target: str = "inductor",
        target_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.__dict__.update({name: getattr(model, name) for name in _SHARED})
        self.__dict__.update(
            model=model,
            recipe=recipe,
            sessions=[],
            training=False,
            last_call=None,
            _settings=dict(
                dynamic=dynamic, mode=mode, target=target, target_options=dict(target_options or {})
            ),
            _parts=parts_of(model),
        )
        self._forget()

    def _forget(self) -> None:
        """Drop what was compiled; the next call compiles."""
        if disabled():
            logger.info("THRESHER_DISABLE is set: %s runs as it was written.", type(self.model).__name__)
            self.__dict__.update(_call=self.model, sessions=[], _sizes=Sizes(False))
            return
        dynamic, mode, target, own_options = self._settings.values()
        # a partial equals no other: Dynamo would run a second model of the class on an equal backend's graphs
        own = functools.partial(
            backend.compile_graph, recipe=self.recipe, target=target, mode=mode, strict=True, **own_options
        )
        compile = functools.partial(torch.compile, backend=own, dynamic=dynamic, **isolated())
        call = ByLayers(self.model, self.recipe, target, compile)
        self.__dict__.update(_call=call, sessions=[], _sizes=Sizes(dynamic))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # inside another compiled function it is a call, not code
            return _apart(super().__call__, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return _apart(self._run, *args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with plain_mode(args, kwargs) as (given, named, copies):
            try:
                result = self._run_once(*given, **named)
            except torch._dynamo.exc.TorchRuntimeError:
                if not self._sizes.give_up():
                    raise
                logger.info("%s gets a program for one row of its own.", type(self.model).__name__)
                result = self._run_once(*given, **named)
        if copies and any(s.program.updates for s in self.sessions):
            for tensor, copy in copies:
                tensor.copy_(copy)
        return result

    def _run_once(self, *args: Any, **kwargs: Any) -> Any:
        anew = not self.sessions
        with (
            sessions.collect() as made,
            torch.no_grad(),
            unwrapped(),
            specialized_floats(),
            room_for_graphs(),
            tractable(self._parts),
            given_tokens.read_from_ids(
                prompt_tokens.kinds(self.recipe, getattr(self.model, "config", None), kwargs),
                prompt_tokens.question(self.recipe, kwargs),
            ),
            self._sizes.prepared(args, kwargs) as given,
            phases.call(),
        ):
            result = self._call(*args, **given)
        self.sessions += made
        undone = rewrote_nothing([s.report for s in made]) if anew else None
        if undone is not None:
            warn(f"thresher rewrote nothing in {type(self.model).__name__}: {undone}", stacklevel=3)
        return result

    @property
    def reports(self) -> list[Report]:
        """One report for each graph; a model without graph breaks has one for each kind of shape."""
        return [s.report for s in self.sessions]

    @property
    def report(self) -> Report:
        """The report of the graph in which most sites were rewritten."""
        return self._first().report

    @property
    def certificates(self) -> list[Certificate]:
        """One for each report."""
        return [s.certificate for s in self.sessions]

    @property
    def certificate(self) -> Certificate:
        """The certificate of the graph in which most sites were rewritten."""
        return self._first().certificate

    def _first(self) -> Session:
        if not self.sessions:
            if disabled():
                raise ThresherError("THRESHER_DISABLE is set: the model runs as it was written.")
            raise ThresherError(
                "Nothing is compiled yet: a copy, a model read from a file and one that was moved or cast compile when "
                "they are called. Call it once."
            )
        return max(self.sessions, key=lambda s: s.report.rewritten)

    @property
    def counters(self) -> list[Counters]:
        return [s.counters for s in self.sessions]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `generate` (transformers), with each step compiled; see `generation.generate`.

        wait=True compiles each program before it runs first; without, the first tokens do not wait for a compiler. Raises
        ArgumentError before the first token for what cannot work. `last_call` then says what it did.
        """
        with plain_mode(args, kwargs, whole=cache_of(kwargs) is None) as (given, named, _):
            result, done = generate(self, self.model, *given, **named)
        self.__dict__["last_call"] = done
        return result

    # -- as a module ------------------------------------------------------------------------------------------------

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The model's class: `isinstance(compiled, PreTrainedModel)` is what pipelines and trainers ask. Dynamo looks
        methods up in it, and would compile the model's own code."""
        return type(self) if tracing() else type(self.model)

    def train(self, mode: bool = True) -> Compiled:
        """`train(False)` puts the model into eval mode. Raises ArgumentError for True."""
        if mode:
            raise ArgumentError(
                "mode",
                "True",
                "False: a compiled model runs without recording gradients",
                "Train its .model, which has the same weights, then call eval() and go on with this one.",
            )
        self.model.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Compiled:
        return self._of_class("to", *args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Compiled:
        return self._of_class("cuda", *args, **kwargs)

    def half(self, *args: Any) -> Compiled:
        return self._of_class("half", *args)

    def float(self, *args: Any) -> Compiled:
        return self._of_class("float", *args)

    def _of_class(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of nn.Module as the model's class has it (transformers refuses to move some models)."""
        return getattr(type(self.model), name)(self, *args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Compiled:
        before = self._kinds()
        self.model._apply(fn, recurse)
        if self._kinds() != before:
            self._forget()
        return self

    def _kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(t.dtype, t.device) for t in (*self.model.parameters(), *self.model.buffers())]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.model._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.model._load_from_state_dict(*args)

    def _get_name(self) -> str:
        return f"Compiled{type(self.model).__name__}"

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("model")
        if model is None:  # while it is being made
            raise AttributeError(name)
        found = getattr(model, name)
        if inspect.ismethod(found) and found.__self__ is model:
            return types.MethodType(found.__func__, self)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WRAPPERS or name in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.model, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.model)})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        hooks = {name: self.__dict__[name].copy() for name in _HOOKS}
        return _remade, (self.model, self.recipe, self._settings), hooks

    def __setstate__(self, hooks: dict[str, Any]) -> None:
        self.__dict__.update(hooks)


@torch._dynamo.disable(reason="A model compiled by Thresher runs graphs of its own.")
def _apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@functools.lru_cache(maxsize=256)
def _of(forward: Callable[..., Any]) -> type[Compiled]:
    """The kind of Compiled whose `forward` has a model's signature, for libraries, but no `__wrapped__` to that model's."""

    def compiled(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        return Compiled.forward(self, *args, **kwargs)

    compiled.__name__, compiled.__doc__ = "forward", forward.__doc__
    compiled.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return type("Compiled", (Compiled,), {"forward": compiled})


def _remade(model: torch.nn.Module, recipe: Recipe, settings: dict[str, Any]) -> Compiled:
    return Compiled(model, recipe, **settings)
