"""What an attention mask lets a real token see, found by evaluating the mask's own subgraph.

A mask is a function of the padding mask and the sizes. Evaluated on a few padding patterns (full,
right-padded, left-padded, holed) and restricted to real queries and keys, it is either everything,
everything earlier, a window of those, or something only the mask itself can say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from thresher.compat import is_fake, without_fake_mode
from thresher.graph.nodes import value
from thresher.graph.packed_layout import Visibility
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from ..extract import extract
from ..structure.sdpa import MASKED

aten = torch.ops.aten


class LeaksPads(Exception):
    """The mask lets a real query see a pad key, so leaving pads out would change the result."""


def padding_patterns(length: int) -> list[torch.Tensor]:
    """bool [length] rows, true for real tokens: full, padded right, padded left, with a hole, one token."""
    position = torch.arange(length)
    quarter = max(1, length // 4)
    hole = (position < quarter) | (position >= 2 * quarter)
    return [position >= 0, position < length - quarter, position >= quarter, hole, position == length - 1]


class MaskProbe:
    """Evaluates one mask of a program at chosen sizes."""

    def __init__(self, program: Program, mask: fx.Node, padding: fx.Node):
        self.program = on_cpu(extract(program, program.placeholders, [mask]))
        self.padding = padding
        self.position = program.placeholders.index(padding)

    def depends_on_values(self) -> list[str]:
        """Inputs other than the padding mask whose values, not only sizes, decide the mask.

        In a dry run that includes weights, whose values are not there.
        """
        inputs = [
            p.name
            for i, p in enumerate(self.program.placeholders)
            if i != self.position and isinstance(value(p), torch.Tensor)
            and any(u.target is not aten.sym_size.int for u in p.users)
        ]  # fmt: skip
        return inputs + [w.fqn for w in self.program.weights.values() if is_fake(w.tensor)]

    def resizable(self) -> bool:
        """Whether the graph was captured with a symbolic sequence length."""
        return self._fixed(1) is None

    def _fixed(self, dim: int) -> int | None:
        """The size of a dimension of [batch, sequence], where any input of that shape has a number there.

        Dynamo may give the mask symbols where it holds the tokens to be as many in every call.
        """
        padding = value(self.padding)
        captured = [example_of(s) for s in padding.shape]
        known = [v for v in map(value, self.program.placeholders) if isinstance(v, torch.Tensor)]
        sizes = [v.shape[dim] for v in (padding, *known) if [example_of(s) for s in v.shape[:2]] == captured]
        return next((size for size in sizes if isinstance(size, int)), None)

    def evaluate(self, real: torch.Tensor) -> torch.Tensor:
        """The mask for a bool [rows, length] padding mask; the sizes must be those captured unless symbolic."""
        bound = self._bind(real.shape)
        inputs: list[Any] = []
        for index, place in enumerate(self.program.placeholders):
            known = value(place)
            if index == self.position:
                inputs.append(real.to(known.dtype))
            elif isinstance(known, torch.Tensor):
                inputs.append(torch.zeros([_at(s, bound) for s in known.shape], dtype=known.dtype))
            else:
                inputs.append(_at(known, bound))
        with without_fake_mode(), torch.no_grad():
            return self.program.run(*inputs)[0]

    def _bind(self, actual: Sequence[int]) -> dict[Any, int]:
        """The symbols of every [batch, sequence, ...] input: Dynamo may give each input symbols of its own."""
        shapes = [value(p).shape for p in self.program.placeholders if isinstance(value(p), torch.Tensor)]
        captured = [example_of(s) for s in value(self.padding).shape]
        bound: dict[Any, int] = {}
        for shape in shapes:
            if [example_of(s) for s in shape[:2]] == captured:
                bound.update({s.node.expr: a for s, a in zip(shape, actual) if not isinstance(s, int)})
        return bound | {
            s.node.expr: a for s, a in zip(value(self.padding).shape, actual) if not isinstance(s, int)
        }

    def rows(self, length: int) -> int:
        """How many rows an evaluation must have."""
        batch, fixed = value(self.padding).shape[0], self._fixed(0)
        if fixed is not None:
            return fixed
        same = str(batch) == str(
            value(self.padding).shape[1]
        )  # one symbol for both: captured with B equal to S
        return length if same else 5

    def classify(self, length: int) -> Visibility:
        """What real queries see at this sequence length. Raises LeaksPads."""
        patterns, rows = padding_patterns(length), self.rows(length)
        found = set()
        for start in range(0, len(patterns), rows):
            chosen = (patterns[start : start + rows] + patterns * rows)[:rows]
            real = torch.stack(chosen)
            mask = self.evaluate(real)
            mask = mask.expand(rows, *mask.shape[1:3], length) if mask.dim() == 4 else mask
            for row in range(min(rows, len(patterns) - start)):
                found.add(_visibility(mask[row], real[row]))
        kinds = {v.kind for v in found if v.kind != "any"}
        if len(kinds) != 1:
            return Visibility("generic") if kinds else Visibility("bidirectional")
        kind = kinds.pop()
        windows = {v.window for v in found if v.kind == kind}
        if windows == {-1} or kind == "generic":
            return Visibility(kind)
        # shorter rows cannot show a window as wide as they are
        widest = max(windows)
        return Visibility(kind, widest) if _consistent(found, kind, widest) else Visibility("generic")


def on_cpu(program: Program) -> Program:
    """The program with every factory on the CPU: a probe needs no accelerator, and none for a meta model."""
    cpu = torch.device("cpu")
    for node in program.nodes():
        node.args = fx.node.map_aggregate(node.args, lambda a: cpu if isinstance(a, torch.device) else a)
        node.kwargs = {k: cpu if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
    for name, weight in list(program.weights.items()):
        if weight.tensor.device != cpu and weight.tensor.device.type != "meta":
            program.weights[name] = dataclasses.replace(weight, tensor=weight.tensor.cpu())
            program.graph_module.register_buffer(name, program.weights[name].tensor, persistent=False)
    program.graph_module.recompile()
    return program


def _consistent(found: set[Visibility], kind: str, widest: int) -> bool:
    return all(v.window in (-1, widest) for v in found if v.kind == kind)


def _at(size: Any, bound: dict[Any, int]) -> int:
    if isinstance(size, int):
        return size
    number = size.node.expr.subs(bound)
    return int(number) if number.is_number else example_of(size)


def _visibility(mask: torch.Tensor, real: torch.Tensor) -> Visibility:
    """mask [heads or 1, queries or 1, keys] of one row; real bool [keys]."""
    length = real.shape[0]
    mask = mask.expand(mask.shape[0], length, length)[:, real]
    seen = mask if mask.dtype == torch.bool else mask > MASKED
    if seen[:, :, ~real].any():
        raise LeaksPads
    seen, inner = seen[:, :, real], mask[:, :, real]
    if (mask.dtype != torch.bool and (inner[seen] != 0).any()) or not (seen == seen[:1]).all():
        return Visibility("generic")
    seen = seen[0]
    positions = torch.arange(length)[real]
    distance = positions[:, None] - positions
    reach = int(distance[seen].abs().max()) if seen.any() else 0
    farthest = int(distance.max()) if distance.numel() else 0
    window = -1 if reach >= farthest else reach
    if farthest == 0:
        return Visibility("any") if seen.all() else Visibility("generic")
    near = distance.abs() <= reach
    if torch.equal(seen, (distance >= 0) & near):
        return Visibility("causal", window)
    if torch.equal(seen, near):
        return Visibility("bidirectional", window)
    return Visibility("generic")
