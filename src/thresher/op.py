"""One operator: its reference, the providers that must agree with it, and which of them a call runs."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import op_signature, plain_form
from .errors import ArgumentError, unknown_key
from .graph.token_labels import TokenRule
from .plain_form import Plain
from .pricing import Price, Rate

_WATCH = threading.local()


def _always() -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    supported: `None` when this machine can run it, else a sentence that says why not. Asked once.
    supports_args: the same, for one call's arguments (dtype, shape, alignment).
    """

    name: str
    device: str
    run: Callable[..., Any]
    supported: Callable[[], str | None] = _always
    supports_args: Callable[..., str | None] | None = None


@dataclass(frozen=True)
class Sample:
    """One call of an operator, for tests: positional arguments and a label."""

    label: str
    args: tuple[Any, ...]


@dataclass
class Op:
    """An operator: the reference that defines it, and the providers that must agree with it.

    See `define` for what the fields hold; `preference` is its `providers`.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    inputs: Callable[[torch.device, torch.dtype], Sequence[Sample]]
    tolerance: Mapping[torch.dtype, float]
    preference: tuple[str, ...] = ()
    price: Price | None = None
    tokens: TokenRule | None = None
    plain: Plain | str = plain_form.NONE
    rates: Sequence[Rate] = ()
    check: Callable[..., Any] | None = None
    providers: list[Provider] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    _usable: dict[str, str | None] = field(default_factory=dict)
    _forced: threading.local = field(default_factory=threading.local)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The `torch.ops.thresher.NAME.default` that graphs hold."""
        return getattr(torch.ops.thresher, self.name).default

    def provider(
        self,
        name: str,
        *,
        device: str,
        supported: Callable[[], str | None] = _always,
        supports_args: Callable[..., str | None] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation.

        Those named in the definition are preferred in its order, then others as they come. Raises ArgumentError
        unless it takes the schema's arguments: the same names in the same order, with the same defaults.
        """

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            if any(p.name == name for p in self.providers):
                raise ArgumentError(
                    "name", repr(name), "a provider name not yet used", "Choose another name."
                )
            where = f"provider {name!r} of thresher::{self.name}"
            op_signature.check(where, run, self.overload._schema)
            if supports_args is not None:
                op_signature.check_count(f"supports_args of {where}", supports_args, self.overload._schema)
            self.providers.append(Provider(name, device, run, supported, supports_args))
            self.providers.sort(key=self._rank)
            return run

        return add

    def _rank(self, provider: Provider) -> int:
        names = self.preference
        return names.index(provider.name) if provider.name in names else len(names)

    def plain_function(self) -> Callable[..., Any] | None:
        """The operator as a function in plain ATen, or None where it has no such form."""
        if isinstance(self.plain, str):
            return None
        return self.plain.run or self.reference

    def usable(self, provider: Provider) -> str | None:
        """Why this machine cannot run the provider, or None. The answer is kept."""
        if provider.name not in self._usable:
            self._usable[provider.name] = provider.supported()
        return self._usable[provider.name]

    def choose(self, *args: Any) -> tuple[Provider, list[tuple[str, str]]]:
        """The provider that a call with `args` runs, and (name, reason) for each one passed over."""
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        forced = getattr(self._forced, "name", None)
        passed: list[tuple[str, str]] = []
        for provider in self.providers:
            if forced is not None:
                if provider.name != forced:
                    continue
            elif provider.device != device:
                continue
            reason = self.usable(provider)
            if reason is None and provider.supports_args is not None:
                reason = provider.supports_args(*args)
            if reason is None:
                return provider, passed
            passed.append((provider.name, reason))
        if forced is not None and forced != "reference":
            raise ArgumentError(
                "provider",
                repr(forced),
                f"a provider of thresher::{self.name} that accepts this call",
                passed[0][1] if passed else f"It has: {', '.join(self.provider_names())}.",
            )
        return Provider("reference", device, self.reference), passed

    def provider_names(self) -> list[str]:
        """The names of its providers in the order they are asked, the reference last."""
        return [p.name for p in self.providers] + ["reference"]

    @contextlib.contextmanager
    def force(self, name: str) -> Iterator[None]:
        """Within the context (this thread), calls run the named provider or raise."""
        if name not in self.provider_names():
            raise unknown_key("provider", name, self.provider_names())
        previous = getattr(self._forced, "name", None)
        self._forced.name = name
        try:
            yield
        finally:
            self._forced.name = previous

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def direct(self, *args: Any, **kwargs: Any) -> Any:
        """A call past PyTorch's dispatcher, for code that has no use for it; arguments as the schema names them."""
        return self.dispatch(*self._complete(args, kwargs))

    def refer(self, *args: Any, **kwargs: Any) -> Any:
        """The reference's result, whatever the device and the dtype; arguments as the schema names them."""
        return self.reference(*self._complete(args, kwargs))

    def _complete(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """All arguments by position, those not given from the schema's defaults."""
        given = list(args)
        for argument in self.overload._schema.arguments[len(args) :]:
            if not kwargs:
                break
            given.append(kwargs.pop(argument.name, argument.default_value))
        if kwargs:
            raise TypeError(f"thresher::{self.name} has no argument {next(iter(kwargs))!r} left to give.")
        return given

    def dispatch(self, *args: Any) -> Any:
        """What PyTorch runs for a call: its arguments are checked, and its provider is chosen and counted."""
        _check_devices(self.name, args)
        if self.check is not None:
            self.check(*args)
        provider, _ = self.choose(*args)
        self.calls[provider.name] += 1
        result = provider.run(*args)
        look = getattr(_WATCH, "look", None)
        if look is not None:
            look(self, provider.name, args, result)
        return result


_NO_TENSOR = frozenset({int, float, bool, str, type(None)})


def _check_devices(name: str, args: Sequence[Any]) -> None:
    """Raise ArgumentError where a call's tensors are not on one device: its provider is chosen by the first."""
    if all(type(a) in _NO_TENSOR or (isinstance(a, torch.Tensor) and a.is_cpu) for a in args):
        return  # in a third of the time
    device = None
    for arg in args:
        for t in arg if isinstance(arg, (list, tuple)) else (arg,):
            if not isinstance(t, torch.Tensor):
                continue
            if device is None:
                device = t.device
            elif t.device != device:
                raise ArgumentError(f"thresher::{name}", f"tensors on {device} and {t.device}",
                                    "tensors on one device", "Move them together.")  # fmt: skip


@contextlib.contextmanager
def watched(look: Callable[[Op, str, tuple[Any, ...], Any], None] | None) -> Iterator[None]:
    """Within the context (this thread), show `look` every call: operator, provider, arguments, result."""
    previous = getattr(_WATCH, "look", None)
    _WATCH.look = look
    try:
        yield
    finally:
        _WATCH.look = previous


def unwatched() -> contextlib.AbstractContextManager[None]:
    """Within the context, calls are shown to nobody."""
    return watched(None)
