"""Runs a program piece by piece over many batches at once, holding one layer's values.

`Sweep` keeps, for each batch, only the values that later pieces read. Weights are computed when a piece needs
them and dropped with it, so that a rotated model never exists as a whole. The same machine in fp64 proves
that a rotated program computes what the original does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thresher import tensor_files
from thresher.errors import ArgumentError
from thresher.graph.program import Program
from thresher.machine.memory import give_back

from ..rewrite import RowWise, materialise

aten = torch.ops.aten
Values = dict[fx.Node, Any]

_HUGE, _PART = (
    1 << 26,
    1 << 24,
)  # elements: a weight that is multiplied in parts in its own type too, and a part of it
_CHUNK = 1 << 21  # weights converted to fp64 at a time: 16 MiB, of which rotating holds a few copies


def bind(program: Program, named: Mapping[str, Any], most: Sequence[int] = ()) -> list[Any]:
    """A value for each placeholder, from the caller's inputs by name; sizes are read off the tensors.

    most: largest extents of the leading dimensions, where the program takes any size; inputs are cut to them.
    """
    cut: dict[fx.Node, Any] = {}
    sizes: dict[str, int] = {}
    for node, name in zip(program.placeholders, program.input_names, strict=True):
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt):
            continue
        if name not in named and not node.users:
            cut[node] = None
            continue
        if name not in named:
            raise ArgumentError(
                "inputs",
                ", ".join(named),
                f"an input named {name!r}",
                "Pass what the model was captured with.",
            )
        given = named[name]
        if isinstance(given, torch.Tensor) and isinstance(known, torch.Tensor):
            for dim, (size, limit) in enumerate(zip(known.shape, most)):
                if isinstance(size, torch.SymInt):
                    given = given.narrow(dim, 0, min(limit, given.shape[dim]))
            for size, actual in zip(known.shape, given.shape):
                if isinstance(size, torch.SymInt):
                    sizes[str(size)] = actual
                elif size != actual:
                    raise ArgumentError(f"input {name!r}", f"shape {list(given.shape)}", f"{list(known.shape)}",
                                        "The model was captured at fixed sizes; give every batch that size.")  # fmt: skip
        cut[node] = given
    return [
        sizes[str(node.meta["val"])] if isinstance(node.meta.get("val"), torch.SymInt) else cut[node]
        for node in program.placeholders
    ]


class Sweep:
    """A program, executed in pieces.

    overrides: by attribute name, what computes a tensor to use instead of the program's weight (a quantised one).
    dtype: compute in this floating dtype, whatever the program says; None leaves dtypes alone. narrow: round what linears of
    wider types multiply to this dtype, and nothing else: their sums stay wide inside, and norms and positions exact.
    """

    def __init__(self, program: Program, dtype: torch.dtype | None = None, narrow: torch.dtype | None = None):
        self.program, self.dtype, self.narrow = program, dtype, narrow
        self._narrowed: dict[str, torch.Tensor] = {}
        self.overrides: dict[str, Callable[[], torch.Tensor]] = {}
        self._held: dict[str, torch.Tensor] = {}
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}

    def start(self, inputs: Sequence[Any]) -> Values:
        """One batch's values at the start: its placeholders."""
        return {
            node: self._cast(given) for node, given in zip(self.program.placeholders, inputs, strict=True)
        }

    def needed(
        self, targets: Iterable[fx.Node], known: Mapping[fx.Node, Any] | set[fx.Node]
    ) -> list[fx.Node]:
        """The nodes to run, in order, to have `targets` from what is known."""
        found: set[fx.Node] = set()
        stack = [t for t in targets if t not in known]
        while stack:
            node = stack.pop()
            if node in found or node in known or node.op == "get_attr":
                continue
            found.add(node)
            stack += node.all_input_nodes
        return sorted(found, key=self.order.__getitem__)

    def run(
        self, values: Values, targets: Iterable[fx.Node], nodes: Sequence[fx.Node] | None = None
    ) -> Values:
        """`values` with those of the targets added; what was needed only on the way is dropped early."""
        targets = set(targets)
        nodes = self.needed(targets, values) if nodes is None else nodes
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for argument in node.all_input_nodes:
                last[argument] = node
        keep = set(values) | targets
        env = dict(values)
        for node in nodes:
            env[node] = self.call(node, env)
            for argument in node.all_input_nodes:
                if last[argument] is node and argument not in keep:
                    env.pop(argument, None)
        return {n: v for n, v in env.items() if n in keep}

    def weight(self, name: str) -> torch.Tensor:
        """A weight's values: the override, or computed from the model's, once until `forget`."""
        if name not in self._held:
            other = self.overrides.get(name)
            self._held[name] = (
                materialise(self.program.weights[name], self.dtype) if other is None else other()
            )
        return self._held[name]

    def forget(self) -> None:
        """Drop the weights computed so far, and what was read of mapped files."""
        self._held.clear()
        self._narrowed.clear()
        tensor_files.release()

    def steps(self, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, Any]]:
        """Each node that the outputs need with its value, in order; one weight and the values still needed are held.

        The outputs' own come with the node that makes them.
        """
        values = self.start(inputs)
        nodes = self.needed([n for n in self.program.outputs if n is not None], values)
        last = {argument: i for i, node in enumerate(nodes) for argument in node.all_input_nodes}
        for i, node in enumerate(nodes):
            values[node] = self.call(node, values)
            large = any(held.numel() > _CHUNK for held in self._held.values())
            self.forget()
            if large:  # copies of it in fp64 are what a proof takes, and the C library would keep them all
                give_back()
            yield node, values[node]
            for argument in node.all_input_nodes:
                if last[argument] == i:
                    values.pop(argument, None)

    def call(self, node: fx.Node, env: Values) -> Any:
        """What the node gives on the values in `env`, in the sweep's precision."""
        if node.target is aten.linear.default and (self.dtype == torch.float64 or self._is_huge(node)):
            return self._linear_in_parts(node, env)
        if node.target is aten.linear.default and self.narrow is not None:
            return self._narrow_linear(node, env, self.narrow)
        if node.target is aten.embedding.default and self._looks_up_first(node):
            return self._look_up(node, env)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, env))
        if self.dtype is not None:
            args, kwargs = torch.utils._pytree.tree_map_only(
                torch.dtype, lambda d: self.dtype if d.is_floating_point else d, (args, kwargs)
            )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, node: fx.Node, env: Values) -> Any:
        return self.weight(str(node.target)) if node.op == "get_attr" else env[node]

    def _cast(self, given: Any) -> Any:
        floating = isinstance(given, torch.Tensor) and given.is_floating_point()
        return given.to(self.dtype) if floating and self.dtype is not None else given

    def _looks_up_first(self, node: fx.Node) -> bool:
        held = self.program.weights.get(str(node.args[0].target))  # type: ignore[union-attr]
        return held is not None and (self.dtype is not None or held.derive is not None)

    def _look_up(self, node: fx.Node, env: Values) -> torch.Tensor:
        """Looked up before it is converted or rotated: rows are independent, and few of them are read."""
        name = str(node.args[0].target)  # type: ignore[union-attr]
        held, index = self.program.weights[name], self._value(node.args[1], env)  # type: ignore[arg-type]
        rows, place = torch.unique(index, return_inverse=True)
        tensors = [
            t[rows].to(self.dtype or t.dtype) for t in (held.made_from if held.derive else (held.tensor,))
        ]
        table = held.derive(*tensors) if held.derive else tensors[0]
        return table[place]

    def _narrow_linear(self, node: fx.Node, env: Values, narrow: torch.dtype) -> torch.Tensor:
        """A linear by a stored weight, both rounded where their type is a wider one. The bias is added in it."""
        x, read = self._value(node.args[0], env), node.args[1]  # type: ignore[arg-type]
        bias = self._value(node.args[2], env) if len(node.args) > 2 and node.args[2] is not None else None  # type: ignore[arg-type]
        weight = self._value(read, env)  # type: ignore[arg-type]
        wide = x.dtype
        if read.op != "get_attr" or wide.itemsize <= narrow.itemsize or weight.dtype != wide:  # type: ignore[union-attr]
            return torch.nn.functional.linear(x, weight, bias)
        name = str(read.target)  # type: ignore[union-attr]
        if name not in self._narrowed:
            self._narrowed[name] = weight.to(narrow)
        out = torch.nn.functional.linear(x.to(narrow), self._narrowed[name]).to(wide)
        return out if bias is None else out.add_(bias)

    def _is_huge(self, node: fx.Node) -> bool:
        """Whether a linear's weight is a head's of a large vocabulary, which a product may copy as a whole."""
        read = node.args[1]
        held = self.program.weights.get(str(read.target)) if read.op == "get_attr" else None  # type: ignore[union-attr]
        return held is not None and held.tensor.numel() > _HUGE

    def _linear_in_parts(self, node: fx.Node, env: Values) -> torch.Tensor:
        """A linear whose weight is converted in parts, where it is large and its rows do not depend on each other."""
        x, read = self._value(node.args[0], env), node.args[1]  # type: ignore[arg-type]
        bias = self._value(node.args[2], env) if len(node.args) > 2 and node.args[2] is not None else None  # type: ignore[arg-type]
        held = self.program.weights.get(str(read.target)) if read.op == "get_attr" else None  # type: ignore[union-attr]
        by_rows = held is not None and (isinstance(held.derive, RowWise) or not held.source)
        if held is None or not by_rows or str(read.target) in self.overrides or held.tensor.numel() <= _CHUNK:  # type: ignore[union-attr]
            return torch.nn.functional.linear(x, self._value(read, env), bias)  # type: ignore[arg-type]
        dtype = self.dtype or held.tensor.dtype
        rows, columns = held.tensor.shape
        step = max(1, (_CHUNK if self.dtype else _PART) // columns)
        parts = []
        for first in range(0, rows, step):
            chosen = slice(first, first + step)
            if isinstance(held.derive, RowWise):
                part = held.derive.rows(held.made_from, chosen, dtype)
            else:
                part = held.tensor[chosen].to(dtype)
            parts.append(torch.nn.functional.linear(x, part))
            tensor_files.release()
        out = torch.cat(parts, -1)
        return out if bias is None else out + bias


def exactness(
    original: Program,
    rotated: Program,
    inputs: Sequence[Any],
    compare: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> float:
    """Largest difference of any output between two programs in fp64, relative to that output's largest value.

    inputs: of the original's placeholders; keep them short, fp64 is slow.
    compare: `(index, expected, actual)` -> the parts to compare, such as the real tokens.
    """
    results = []
    for program in (original, rotated):
        sweep = Sweep(program, torch.float64)
        outputs = [n for n in program.outputs if n is not None]
        found = {n: v for n, v in sweep.start(inputs).items() if n in outputs}
        found |= {n: v for n, v in sweep.steps(inputs) if n in outputs}
        results.append([found[n] if n in found else sweep.weight(str(n.target)) for n in outputs])
    worst = 0.0
    for index, (expected, actual) in enumerate(zip(*results, strict=True)):
        if not isinstance(expected, torch.Tensor) or not expected.is_floating_point() or not expected.numel():
            continue
        if compare is not None:
            expected, actual = compare(index, expected, actual)
        scale = expected.abs().max().clamp_min(1e-30)
        difference = float((expected - actual).abs().max() / scale)
        worst = difference if not difference <= worst else worst
    return worst
