"""A small matcher for expressions in the dialect.

A pattern is written as the expression it stands for, and is matched backwards from its result:

    x, weight = Var("x"), Var("weight", is_weight, "a weight")
    scaled = mul(x, rsqrt(add(mean(square(x), [-1], True), Number("eps"))))
    match(mul(weight, scaled), node)

Sums and products match in either order, casts between floating types are looked through, and a
variable that occurs twice must stand for the same value. When nothing matches, the Mismatch tells
how far the best attempt came and which node ended it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from thresher.graph.nodes import value

aten = torch.ops.aten

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default}


@dataclass(frozen=True)
class Var:
    """Any node that `where` accepts. said: what it accepts, for the sentence when it does not."""

    name: str
    where: Callable[[fx.Node], bool] | None = None
    said: str = "a tensor"
    through_casts: bool = False


@dataclass(frozen=True)
class Anything:
    """Any argument at all, the sizes of a reshape for example."""


@dataclass(frozen=True)
class Number:
    """Any number that stands in the graph as a constant."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of one of `targets` with exactly these arguments; constants and lists stand for themselves."""

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Either:
    """The first alternative that fits."""

    alternatives: tuple[Any, ...]


def call(*targets: Any, name: str = "") -> Callable[..., Call]:
    """A pattern constructor: `call(aten.tanh.default)(x)`."""
    return lambda *args, **kwargs: Call(targets, args, kwargs, name)


def either(*alternatives: Any) -> Either:
    """A pattern that matches where one of these does; they are tried in order."""
    return Either(alternatives)


@dataclass(frozen=True)
class Bindings:
    """What the variables stand for, and the nodes the pattern covers (without the variables)."""

    values: dict[str, Any]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What a variable of the pattern stands for, or `default` where it was not bound."""
        return self.values.get(name, default)

    def __bool__(self) -> Literal[True]:
        return True


@dataclass
class Mismatch:
    """Why nothing matched. covered: how many nodes the best attempt matched before `reason` ended it."""

    reason: str
    covered: int = -1

    def __bool__(self) -> Literal[False]:
        return False

    def note(self, covered: int, reason: str) -> None:
        """Keep a reason if its attempt got further (`covered` nodes) than the one kept so far."""
        if covered > self.covered:
            self.covered, self.reason = covered, reason


def match(pattern: Any, node: object) -> Bindings | Mismatch:
    """Match a pattern whose result is `node`. A Mismatch is false."""
    best = Mismatch("")
    for values, nodes in _attempts(pattern, node, {}, (), best):
        return Bindings(values, nodes)
    return best


def is_cast(node: object) -> bool:
    """Whether a node only changes one floating type into another."""
    if not isinstance(node, fx.Node) or node.target not in CASTS or not node.args:
        return False
    before, after = value(node.args[0]), value(node)
    return (
        isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
        and before.is_floating_point() and after.is_floating_point()
    )  # fmt: skip


def uncast(node: Any) -> Any:
    """The value before any floating casts."""
    while is_cast(node):
        node = node.args[0]
    return node


State = tuple[dict[str, Any], tuple[fx.Node, ...]]


def _attempts(
    pattern: Any, given: Any, values: dict[str, Any], nodes: tuple[fx.Node, ...], best: Mismatch
) -> Iterator[State]:
    if isinstance(pattern, Either):
        for alternative in pattern.alternatives:
            yield from _attempts(alternative, given, values, nodes, best)
    elif isinstance(pattern, Anything):
        yield values, nodes
    elif isinstance(pattern, Var):
        yield from _variable(pattern, given, values, nodes, best)
    elif isinstance(pattern, Number):
        is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if is_number and values.get(pattern.name, given) == given:
            yield {**values, pattern.name: given}, nodes
            return
        best.note(len(nodes), f"{described(given)} is not the number expected for {pattern.name}")
    elif isinstance(pattern, Call):
        yield from _call(pattern, given, values, nodes, best)
    elif isinstance(pattern, (list, tuple)):
        if isinstance(given, (list, tuple)) and len(given) == len(pattern):
            yield from _sequence(list(zip(pattern, given)), values, nodes, best)
        else:
            best.note(len(nodes), f"{described(given)} is not a list of {len(pattern)}")
    elif _same_constant(pattern, given):
        yield values, nodes
    else:
        best.note(len(nodes), f"{described(given)} is not {pattern}")


def _variable(
    pattern: Var, given: Any, values: dict[str, Any], nodes: tuple[fx.Node, ...], best: Mismatch
) -> Iterator[State]:
    if pattern.through_casts:
        given = uncast(given)
    if not isinstance(given, fx.Node) or (pattern.where is not None and not pattern.where(given)):
        best.note(len(nodes), f"{described(given)} is not {pattern.said}")
    elif values.get(pattern.name, given) is not given:
        best.note(len(nodes), f"{pattern.name} would be both {values[pattern.name].name} and {given.name}")
    else:
        yield {**values, pattern.name: given}, nodes


def _call(
    pattern: Call, given: Any, values: dict[str, Any], nodes: tuple[fx.Node, ...], best: Mismatch
) -> Iterator[State]:
    if is_cast(given) and given.target not in pattern.targets:
        given = uncast(given)
    if not isinstance(given, fx.Node) or given.target not in pattern.targets:
        expected = " or ".join(str(t).removeprefix("aten.") for t in pattern.targets)
        best.note(len(nodes), f"{described(given)} is not {expected}")
        return
    if len(given.args) != len(pattern.args) or set(given.kwargs) != set(pattern.kwargs):
        best.note(len(nodes), f"{described(given)} has other arguments than expected")
        return
    pairs = [(pattern.kwargs[k], given.kwargs[k]) for k in pattern.kwargs]
    orders = [list(zip(pattern.args, given.args))]
    if given.target in COMMUTATIVE and len(given.args) == 2:
        orders.append(list(zip(pattern.args, reversed(given.args))))
    if pattern.name:
        values = {**values, pattern.name: given}
    for order in orders:
        yield from _sequence(order + pairs, values, (*nodes, given), best)


def _sequence(
    pairs: list[tuple[Any, Any]], values: dict[str, Any], nodes: tuple[fx.Node, ...], best: Mismatch
) -> Iterator[State]:
    if not pairs:
        yield values, nodes
        return
    (pattern, given), *rest = pairs
    for next_values, next_nodes in _attempts(pattern, given, values, nodes, best):
        yield from _sequence(rest, next_values, next_nodes, best)


def _same_constant(expected: Any, given: Any) -> bool:
    if isinstance(expected, float) and isinstance(given, (int, float)):
        return math.isclose(expected, given, rel_tol=1e-6)
    return type(given) in (int, float, bool, str, type(None), torch.dtype) and bool(expected == given)


def described(given: Any) -> str:
    """A graph argument in a sentence: `mul_3 (mul.Tensor)`."""
    if isinstance(given, fx.Node):
        return (
            f"{given.name} ({str(given.target).removeprefix('aten.')})"
            if given.op == "call_function"
            else given.name
        )
    return repr(given)
