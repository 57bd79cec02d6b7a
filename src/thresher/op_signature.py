"""Whether a function can stand for an operator: its arguments are those of the schema, by name, order and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .errors import ArgumentError


def check(what: str, function: Callable[..., Any], schema: torch.FunctionSchema) -> None:
    """Raise ArgumentError unless `function` takes the schema's arguments: the same names, in order, with the same
    defaults, and no others. what: the argument under which the caller was given the function."""
    found, wanted = _signature(what, function), list(schema.arguments)
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = list(found.parameters.values())
    faults = [f"{p} is no plain argument" for p in given if p.kind not in plain]
    if not faults and [p.name for p in given] != [a.name for a in wanted]:
        missing = [a.name for a in wanted if a.name not in found.parameters]
        extra = [p.name for p in given if p.name not in {a.name for a in wanted}]
        faults = [f"{', '.join(missing)} missing"] if missing else []
        faults += [f"{', '.join(extra)} not in the schema"] if extra else []
        faults = faults or ["its arguments stand in another order"]
    if not faults:
        faults = [why for p, a in zip(given, wanted) if (why := _default(p, a)) is not None]
    if faults:
        raise _error(what, function, found, schema, "; ".join(faults))


def check_count(what: str, function: Callable[..., Any], schema: torch.FunctionSchema) -> None:
    """Raise ArgumentError unless `function` can be called with all of the schema's arguments, in order.

    For functions beside the operator (`fake`, `supports_args`), which one may share among operators under names of
    its own.
    """
    found = _signature(what, function)
    try:
        found.bind(*schema.arguments)
    except TypeError as reason:
        raise _error(what, function, found, schema, str(reason)) from None


def _signature(what: str, function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise ArgumentError(
            what, repr(function), "a Python function whose arguments can be read", "Wrap it in one."
        ) from None


def _default(parameter: inspect.Parameter, argument: torch.Argument) -> str | None:
    """What is wrong with a parameter's default, or None."""
    has = parameter.default is not inspect.Parameter.empty
    if has != argument.has_default_value():
        return f"{parameter.name} has {'a' if has else 'no'} default, and in the schema {'none' if has else 'one'}"
    if has and parameter.default != argument.default_value:
        return f"{parameter.name}={parameter.default!r}, and in the schema {argument.default_value!r}"
    return None


def _error(
    what: str, function: Callable[..., Any], found: inspect.Signature, schema: torch.FunctionSchema, why: str
) -> ArgumentError:
    name = getattr(function, "__name__", repr(function))
    return ArgumentError(
        what, f"{name}{found} ({why})", f"the arguments of {schema}", "Name them as the schema does."
    )
