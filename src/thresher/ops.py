"""Operators of the `thresher::` namespace.

An operator *is* its reference: a function in plain PyTorch, readable and slow. Everything else
about it (schema, fake, an input generator, a tolerance) stands beside that reference, and every
faster implementation is a provider that must agree with it. Calling `torch.ops.thresher.NAME`
picks, per call, the first provider that this machine supports and that accepts these arguments;
which one ran, and why a faster one did not, can be read back from the operator.

    @define("scale_rows(Tensor x, Tensor s) -> Tensor", fake=lambda x, s: torch.empty_like(x),
            inputs=_inputs, tolerance={torch.float32: 1e-6})
    def scale_rows(x, s):
        return x * s[:, None]

    @scale_rows.provider("cpu_cpp", device="cpu", supported=native.available)
    def _(x, s): ...
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ArgumentError, unknown_key

NAMESPACE = "thresher"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, Op] = {}
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
    """An operator: the reference that defines it, and the providers that must agree with it."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    inputs: Callable[[torch.device, torch.dtype], Sequence[Sample]]
    tolerance: Mapping[torch.dtype, float]
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
        """Register an implementation; earlier registrations are preferred."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            if any(p.name == name for p in self.providers):
                raise ArgumentError(
                    "name", repr(name), "a provider name not yet used", "Choose another name."
                )
            self.providers.append(Provider(name, device, run, supported, supports_args))
            return run

        return add

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
        given = list(args)
        for argument in self.overload._schema.arguments[len(args) :]:
            if not kwargs:
                break
            given.append(kwargs.pop(argument.name, argument.default_value))
        if kwargs:
            raise TypeError(f"thresher::{self.name} has no argument {next(iter(kwargs))!r} left to give.")
        return self._dispatch(*given)

    def _dispatch(self, *args: Any) -> Any:
        provider, _ = self.choose(*args)
        self.calls[provider.name] += 1
        result = provider.run(*args)
        look = getattr(_WATCH, "look", None)
        if look is not None:
            look(self, provider.name, args, result)
        return result


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    inputs: Callable[[torch.device, torch.dtype], Sequence[Sample]],
    tolerance: Mapping[torch.dtype, float],
) -> Callable[[Callable[..., Any]], Op]:
    """Define `thresher::NAME` from its reference.

    schema: the torch schema, name included; functional (no mutation, no aliasing).
    fake: output metadata from fake inputs; must give the reference's shapes, dtypes and strides.
    inputs: `(device, dtype) -> samples`, tails and empty cases included; one generic test feeds
        them to `torch.library.opcheck` and to every provider.
    tolerance: largest relative L2 error of a provider against the reference in fp64 or fp32, per
        activation dtype. A dtype that is absent is not supported. Justify loosened numbers in a comment.
    """

    def register(reference: Callable[..., Any]) -> Op:
        name = schema.split("(", 1)[0].strip()
        op = Op(name, schema, reference, fake, inputs, tolerance)
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, op._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        op.overload.direct = op.direct  # type: ignore[attr-defined]
        _OPS[name] = op
        return op

    return register


def get(name: str) -> Op:
    """The operator of that name."""
    if name not in _OPS:
        raise unknown_key("op", name, _OPS)
    return _OPS[name]


def all_ops() -> list[Op]:
    """Every operator defined so far, by name."""
    return [_OPS[name] for name in sorted(_OPS)]


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
