"""Names of a captured graph's weights and modules, for people; what a weight *is*, its source or its tensor says.

Dynamo finds a weight at an expression such as `L['self'].ls[0]._modules['lin']._parameters['weight']`. Its name is the
part that the model's own `named_parameters` would give, `lin.weight`. Where one graph holds two weights whose names
would be equal, as with two models of one class or a plain list of modules, all its names say more: `ls.0.lin.weight`,
then also what the expression begins with, `query.lin.weight`. Two weights of one graph never share a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence

_PART = re.compile(r"(_parameters|_buffers|_modules)\[['\"]([^'\"]+)['\"]\]")
ROOT = re.compile(r"^(?:[LG]\[['\"][^\]]*['\"]\])?(?:\[\d+\])?\.?")


def weight_names(sources: Sequence[str], identities: Sequence[Hashable]) -> list[str]:
    """A name for each weight: the shortest kind of name by which all of a graph's weights are told apart.

    sources: Dynamo's expressions. identities: equal for those that are one tensor.
    """
    models = {ROOT.sub("", s[: _head(s)], count=1) for s in sources}
    for kind in (*([_usual] if len(models) < 2 else []), path, dotted):
        names = [kind(s) for s in sources]
        if _tell_apart(names, identities):
            return names
    return _numbered(names, identities)


def is_weight(source: str) -> bool:
    """Whether an expression leads to a parameter or buffer of a module."""
    parts = _PART.findall(source)
    return bool(parts) and parts[-1][0] in ("_parameters", "_buffers")


def _usual(source: str) -> str:
    """The path from the first module on, as `named_parameters` of the model has it."""
    return dotted(source[_head(source) :])


def _head(source: str) -> int:
    """How much of an expression leads to the model."""
    found = _PART.search(source)
    return found.start() if found else 0


def path(source: str) -> str:
    """The path below what the expression begins with: `ls.0.lin` for `L['self'].ls[0].lin`."""
    return dotted(ROOT.sub("", source, count=1))


def dotted(source: str) -> str:
    """An expression as names with dots between them: `L['q']._modules['ls'][0].lin` is `q.ls.0.lin`."""
    text = re.sub(r"^[LG](?=\[)", "", source)
    text = re.sub(r"(?:^|\.)(?:_modules|_parameters|_buffers)(?=\[)", "", text)
    text = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", text)
    return text.replace("slf.", "").strip(".")


def _tell_apart(names: Sequence[str], identities: Sequence[Hashable]) -> bool:
    owners: dict[str, Hashable] = {}
    return all(owners.setdefault(n, i) == i for n, i in zip(names, identities))


def _numbered(names: Sequence[str], identities: Sequence[Hashable]) -> list[str]:
    """Names with a number behind those that would be another weight's."""
    owners: dict[str, Hashable] = {}

    def own(name: str, identity: Hashable) -> str:
        number, found = 2, name
        while owners.setdefault(found, identity) != identity:
            found, number = f"{name}~{number}", number + 1
        return found

    return [own(n, i) for n, i in zip(names, identities)]


def unused(name: str, taken: Callable[[str], bool]) -> str:
    """The name, or the first of `name~2`, `name~3`, ... that is not taken."""
    number, found = 2, name
    while taken(found):
        found, number = f"{name}~{number}", number + 1
    return found
