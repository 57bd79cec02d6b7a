"""From how long a model's inputs may be to the optimization profiles of engines.

An engine is built for a range of each size that varies: the smallest, the usual one, which it is tuned for, and the
largest. Ranges are given for the model's own inputs, or taken from the example; sizes inside the program follow from
them by the program's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thresher.errors import ArgumentError, ThresherError, unknown_key
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

Shapes = Mapping[str, Sequence[Sequence[int]]]
Range = tuple[int, int, int]
GROWTH = 4
"""How many times the example's a size may be where nobody said: what an engine is built to hold takes memory."""


def checked(profiles: Any) -> dict[str, list[list[int]]]:
    """Profiles as the option takes them: by input, its smallest, usual and largest shape. Raises ArgumentError."""
    if not isinstance(profiles, Mapping):
        raise ArgumentError("profiles", repr(profiles), "a dict of inputs and their three shapes",
                            "Such as {'input_ids': [(1, 8), (4, 64), (16, 256)]}.")  # fmt: skip
    found = {}
    for name, given in profiles.items():
        shapes = [list(shape) for shape in given]
        if len(shapes) != 3 or len({len(s) for s in shapes}) != 1:
            raise ArgumentError(
                f"profiles[{name!r}]", given, "three shapes of one rank", "Give smallest, usual, largest."
            )
        if any(not isinstance(n, int) or n < 1 for s in shapes for n in s) or not all(
            a <= b <= c for a, b, c in zip(*shapes)
        ):
            raise ArgumentError(f"profiles[{name!r}]", given, "sizes of at least 1 that grow",
                                "Give smallest, usual, largest.")  # fmt: skip
        found[name] = shapes
    return found


class Ranges:
    """What each symbol of a program may be. profiles: as `checked` gives them; empty to go by the example."""

    def __init__(self, program: Program, profiles: Shapes):
        self._known: dict[Any, Range] = {}
        outside = program.packing.padded if program.packing is not None else program
        _refuse_unknown(outside, profiles)
        most = {}
        for place, name in zip(program.placeholders, program.input_names):
            if program.packing is None and name in profiles:
                self._by_shapes(name, value(place), profiles[name])
        if program.packing is not None:
            most = _tokens(program, profiles)
        for node in program.graph.nodes:
            for known in _all_tensors(value(node)):
                for size in known.shape:
                    self._by_example(size, most)

    def of(self, size: Any) -> Range:
        """The smallest, usual and largest value of a size."""
        if isinstance(size, int):
            return size, size, size
        expr = size.node.expr
        ends = [int(expr.xreplace({s: self._known[s][end] for s in expr.free_symbols})) for end in range(3)]
        return min(ends), ends[1], max(ends)

    def shapes(self, part: Program) -> dict[str, list[list[int]]]:
        """The three shapes of each input of a part that has sizes that vary."""
        found = {}
        for place, name in zip(part.placeholders, part.input_names):
            known = value(place)
            if isinstance(known, torch.Tensor) and any(not isinstance(s, int) for s in known.shape):
                found[name] = [list(shape) for shape in zip(*(self.of(s) for s in known.shape))]
        return found

    def _by_shapes(self, name: str, known: Any, shapes: Sequence[Sequence[int]]) -> None:
        if len(shapes[0]) != known.dim():
            raise ArgumentError(f"profiles[{name!r}]", shapes, f"shapes of {known.dim()} sizes, as the input has",
                                "Give smallest, usual, largest.")  # fmt: skip
        for size, three in zip(known.shape, zip(*shapes)):
            if isinstance(size, int):
                if set(three) != {size}:
                    raise ArgumentError(
                        f"profiles[{name!r}]",
                        shapes,
                        f"{size} where the model was compiled for {size} alone",
                        "Compile with dynamic=True for sizes that vary.",
                    )
            elif size.node.expr.is_symbol:
                self._known[size.node.expr] = (three[0], three[1], three[2])

    def _by_example(self, size: Any, most: Mapping[str, Range]) -> None:
        if isinstance(size, int):
            return
        env = size.node.shape_env
        for symbol in size.node.expr.free_symbols:
            if symbol in self._known:
                continue
            usual = example_of(size) if symbol == size.node.expr else _usual(env, symbol)
            bounds = env.var_to_range.get(symbol)
            low = max(1, _bound(bounds, "lower", 1))
            high = min(GROWTH * usual, _bound(bounds, "upper", GROWTH * usual))
            if str(symbol) in most:
                low, usual, high = most[str(symbol)]
            self._known[symbol] = (min(low, usual), usual, max(high, usual))


def check_sizes(place: str, shape: Sequence[int], profile: Sequence[Sequence[int]]) -> None:
    """Raise ThresherError where a call's sizes lie outside what an engine was built for."""
    low, _, high = profile
    if not all(a <= n <= b for a, n, b in zip(low, shape, high)):
        raise ThresherError(
            f"The engine takes {place} from {tuple(low)} to {tuple(high)}, and this call has {tuple(shape)}. Compile with "
            "profiles={...} that hold such calls: the smallest, usual and largest shape of each input of the model."
        )


def _tokens(program: Program, profiles: Shapes) -> dict[str, Range]:
    """Of a packed body, the symbol of its tokens and what it may be: from the padded shapes of the model's inputs."""
    layout = program.packing
    outside = layout.padded
    name = outside.input_names[layout.tokens]
    if name not in profiles:
        return {}
    tokens = next((s for s in _token_sizes(program) if not isinstance(s, int)), None)
    if tokens is None:
        return {}
    low, usual, high = (shape[0] * shape[1] for shape in profiles[name])
    return {str(tokens.node.expr): (min(2, low), usual, high)}


def _token_sizes(program: Program) -> list[Any]:
    """The second size of what a packed body takes as [1, tokens, ...]."""
    shapes = [value(p).shape for p in program.placeholders if isinstance(value(p), torch.Tensor)]
    return [s[1] for s in shapes if len(s) > 1 and isinstance(s[0], int) and s[0] == 1]


def _refuse_unknown(program: Program, profiles: Shapes) -> None:
    for name in profiles:
        if name not in program.input_names:
            raise unknown_key("profiles", name, program.input_names)


def _usual(env: Any, symbol: Any) -> int:
    """The example's value of a symbol that is no tensor's size by itself."""
    for name in ("backed_var_to_val", "var_to_val"):  # by torch's version
        found = getattr(env, name, {}).get(symbol)
        if found is not None:
            return int(found)
    return 2


def _bound(bounds: Any, end: str, default: int) -> int:
    try:
        return int(getattr(bounds, end))
    except (TypeError, AttributeError, OverflowError, ValueError):
        return default  # no bound, or an endless one


def _all_tensors(known: Any) -> list[torch.Tensor]:
    flat = known if isinstance(known, (tuple, list)) else [known]
    return [t for t in flat if isinstance(t, torch.Tensor)]
