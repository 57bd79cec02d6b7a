"""Recipes as TOML files: how one is written, and read with the file and the line in every error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import ArgumentError
from .reading import said

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write(given: Mapping[str, Any]) -> str:
    """A file's text for what `Recipe.to_dict` gave."""
    scalars = {k: v for k, v in given.items() if not isinstance(v, Mapping)}
    lines = [f"{k} = {_value(v)}" for k, v in scalars.items()]
    for name, options in given.items():
        if isinstance(options, Mapping):
            lines += ["", f"[{name}]", *(f"{json.dumps(k) if not k.isidentifier() else k} = {_value(v)}"
                                         for k, v in options.items() if v is not None)]  # fmt: skip
    return "\n".join(lines).strip() + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    # repr writes inf and nan as TOML does
    return json.dumps(value) if isinstance(value, str) else repr(value)


def read(path: Path) -> dict[str, Any]:
    """What stands in a file; the paths in it, which are seen from its folder, as seen from here."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(
            "recipe",
            f"{str(path)!r}: {error.strerror}",
            "the path of an existing TOML file",
            "Check the path.",
        ) from None
    except (
        ValueError,
        RecursionError,
        MemoryError,
        TypeError,
    ) as error:  # bytes that are no text, deep nesting
        raise ArgumentError(
            "recipe", repr(str(path)), "valid TOML", f"The parser says: {said(error)}."
        ) from None
    for key in ("stats", "recipe"):
        if isinstance(given.get(key), str) and (key == "stats" or given[key].endswith(".toml")):
            given[key] = os.path.normpath(path.parent / given[key])
    return given


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Within the context an ArgumentError about something in the file says where it stands there."""
    try:
        yield
    except ArgumentError as error:
        if ".toml" in error.argument:  # told of a file already
            raise
        line = line_of(path.read_text(encoding="utf-8"), f"{error.argument} {error.given}")
        place = str(path) if line is None else f"{path}, line {line}"
        raise ArgumentError(f"{place}: {error.argument}", error.given, error.accepted, error.fix) from None


def line_of(text: str, words: str) -> int | None:
    """The number, from one, of the line whose key the words name; the last of several in the table they name."""
    said = set(re.findall(r"[\w.\-]+", words))
    table, best, found = "", 0, None
    for number, line in enumerate(text.splitlines(), 1):
        heading = re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line)
        key = re.match(r"""\s*["']?([\w.\-]+)["']?\s*=""", line)
        if heading:
            table = heading[1].strip("\"'")
            score = 1 if table in said else 0
        elif key and key[1] in said:
            score = 3 if table and table in said else 2
        else:
            score = 0
        if score > best:
            best, found = score, number
    return found
