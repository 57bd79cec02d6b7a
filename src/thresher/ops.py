"""Operators of the `thresher::` namespace.

An operator *is* its reference: a function in plain PyTorch, readable and slow. Everything else about it
stands beside that reference: schema, fake, an input generator, a tolerance, and what others look up
instead of knowing the operator by name (its price, how tokens go through it, its form in plain operators,
how its speed is measured). Every faster implementation is a provider that must agree with it. Calling
`torch.ops.thresher.NAME` picks, per call, the first provider that this machine supports and that accepts
these arguments; which one ran, and why a faster one did not, can be read back from the operator.

    @define("scale_rows(Tensor x, Tensor s) -> Tensor", fake=lambda x, s: torch.empty_like(x),
            inputs=_inputs, tolerance={torch.float32: 1e-6}, tokens=row_by_row, plain=Plain(), check=_check)
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

from . import op_signature, plain_form
from .errors import ArgumentError, unknown_key
from .graph.token_labels import TokenRule
from .plain_form import Plain
from .pricing import Price, Rate

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
        return self._dispatch(*self._complete(args, kwargs))

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

    def _dispatch(self, *args: Any) -> Any:
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


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    inputs: Callable[[torch.device, torch.dtype], Sequence[Sample]],
    tolerance: Mapping[torch.dtype, float],
    providers: Sequence[str] = (),
    price: Price | None = None,
    tokens: TokenRule | None = None,
    plain: Plain | str = plain_form.NONE,
    rates: Sequence[Rate] = (),
    check: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Define `thresher::NAME` from its reference.

    schema: the torch schema, name included; functional (no mutation, no aliasing).
    fake: output metadata from fake inputs; must give the reference's shapes, dtypes and strides.
    inputs: `(device, dtype) -> samples`, tails and empty cases included; one generic test feeds
        them to `torch.library.opcheck` and to every provider.
    tolerance: largest relative L2 error of a provider against the reference in fp64 or fp32, per
        activation dtype. A dtype that is absent is not supported. Justify loosened numbers in a comment.
    providers: names of its faster implementations, the preferred first; each registers itself (`Op.provider`).
    price: seconds of a call for the cost model (`pricing`); without one its operands' bytes and a call.
    tokens: where the batch and the sequence are in its result (`graph.token_labels`); without one no pass follows
        tokens through it.
    plain: its form in plain ATen for exporters (`plain_form`), or a full sentence on why there is none.
    rates: how `thresher doctor --calibrate` measures its speed, by the classes that `price` asks for.
    check: takes a call's arguments and raises ArgumentError unless they belong together. It runs before every
        provider and before the reference, so none of them need ask again: a kernel reads raw memory, and a
        graph that was loaded may hold anything. Metadata is free to read; of tensors on a CPU it also reads
        what is used as an index (`arguments.in_range`). What it lets through, the reference must compute.

    Raises ArgumentError where a function does not fit the schema.
    """

    def register(reference: Callable[..., Any]) -> Op:
        name = schema.split("(", 1)[0].strip()
        _check(schema, name, reference, fake, plain, check)
        op = Op(
            name, schema, reference, fake, inputs, tolerance,
            tuple(providers), price, tokens, plain, rates, check,
        )  # fmt: skip
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, op._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        op.overload.direct = op.direct  # type: ignore[attr-defined]
        _OPS[name] = op
        return op

    return register


def _check(
    schema: str, name: str, reference: Callable[..., Any], fake: Callable[..., Any], plain: Plain | str,
    check: Callable[..., Any] | None,
) -> None:  # fmt: skip
    """Raise ArgumentError unless the functions of a definition take its schema's arguments."""
    parsed = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
    op_signature.check(f"reference of thresher::{name}", reference, parsed)
    op_signature.check_count(f"fake of thresher::{name}", fake, parsed)
    if isinstance(plain, Plain) and plain.run is not None:
        op_signature.check(f"plain of thresher::{name}", plain.run, parsed)
    if check is not None:
        op_signature.check_count(f"check of thresher::{name}", check, parsed)


def of(target: Any) -> Op | None:
    """The operator that a node's target calls; None for others, those of no definition here among them."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return None
    return _OPS.get(target._schema.name.partition("::")[2])


def _check_devices(name: str, args: Sequence[Any]) -> None:
    """Raise ArgumentError where a call's tensors are not on one device: its provider is chosen by the first."""
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
