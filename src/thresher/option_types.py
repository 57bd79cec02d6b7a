"""Whether an option's value is of the type its field declares, and that type in words: a recipe file is typed by hand."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from .errors import ArgumentError, did_you_mean

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


def check(owner: str, options: Any) -> None:
    """Raise ArgumentError for the first field of a dataclass whose value is not of its declared type.

    owner: what the message calls the field after, as in "nvfp4 option min_weights". A whole number is a number;
    true and false are not. Types other than the words', tuples, lists, dicts and unions are not looked at.
    """
    hints = _hints(type(options))  # type: ignore[arg-type]
    for field in dataclasses.fields(options):
        given, hint = getattr(options, field.name), hints.get(field.name, Any)
        if not _fits(given, hint):
            raise ArgumentError(
                f"{owner} {field.name}", f"{given!r}, which is {type(given).__name__}", _words(hint),
                _fix(field, given, hint),
            )  # fmt: skip


def check_inductor(options: Mapping[str, Any]) -> None:
    """Raise ArgumentError for an option that this torch's Inductor does not have."""
    from torch._inductor import list_options

    known = {name.replace("-", "_") for name in list_options()}
    for name in options:
        if name.replace("-", "_") not in known:
            raise ArgumentError(
                "inductor",
                repr(name),
                "an option of this torch's Inductor",
                f"torch._inductor.list_options() lists them.{did_you_mean(name, known)}",
            )


def _fix(field: dataclasses.Field[Any], given: Any, hint: Any) -> str:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and parts[-1] is Ellipsis and _fits(given, parts[0]):
        return f"Write {field.name}={[given]!r}."
    default = "" if field.default is dataclasses.MISSING else f", such as the default, {field.default!r}"
    return f"Write a value of that kind{default}."


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError:  # names that the author's file imports for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    parts = typing.get_args(hint)
    if _is_union(hint):
        return any(_fits(value, part) for part in parts)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(v, parts[0]) for v in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if typing.get_origin(hint) is dict:  # JSON has null where a number was infinite
        return isinstance(value, dict) and all(
            _fits(k, parts[0]) and (v is None or _fits(v, parts[1])) for k, v in value.items()
        )
    if hint is type(None):
        return value is None
    if hint not in _WORDS:
        return True
    if hint is bool or hint is str:
        return isinstance(value, hint)
    return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(
        value, bool
    )


def _words(hint: Any) -> str:
    parts = [p for p in typing.get_args(hint) if p is not type(None)]
    if _is_union(hint):
        return " or ".join(map(_words, parts))
    if typing.get_origin(hint) is dict:
        return f"names, each with {_words(parts[1])}"
    if typing.get_origin(hint) is list:
        return f"a list, each of it {_words(parts[0])}"
    if typing.get_origin(hint) is tuple:
        if parts[-1] is Ellipsis:
            return f"a list, each of it {_words(parts[0])}"
        return f"a list of {len(parts)}: " + ", ".join(map(_words, parts))
    return _WORDS.get(hint, "what its documentation says")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
