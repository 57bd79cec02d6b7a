"""Further batches to prove a rewrite on, made from the example: other lengths, another order, another scale.

A rewrite that is right on the example may be wrong beside it: a window no longer than the example's rows, a sequence of one
token, a size read as a constant. Each batch is made of the example's own values, so that it is one the model could be
given. Where the program takes any size, the batches are a few short rows, and cost little beside the example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thresher.graph.nodes import value
from thresher.graph.program import Program

from .fewer_rows import first_rows

ROWS, WIDTH = 6, 16  # of a small batch, where sizes are free
SCALE = 2.0
_NO_SCALE = ("mask", "bias", "cache", "past", "key", "value", "scale")  # in names of inputs that are not data


@dataclass(frozen=True, eq=False)
class Batch:
    """label: in words, for the certificate. inputs: in the order of the program's placeholders. rows: how many, where
    they are fewer than the program was captured for."""

    label: str
    inputs: list[Any]
    rows: int | None = None


def example(program: Program, inputs: Sequence[Any]) -> Batch:
    """The example itself as a batch."""
    mask = mask_of(program, inputs)
    size = _size(inputs, mask)
    return Batch(f"the example{size}", list(inputs))


def further(program: Program, inputs: Sequence[Any], rows: int | None = None) -> list[Batch]:
    """The batches beside the example, the one with other lengths first; none where the example offers nothing to vary.

    rows: take so many of the example's, where its sizes are fixed.
    """
    small = first_rows(inputs, rows) if rows is not None else _resized(program, list(inputs))
    mask = mask_of(program, small)
    found = []
    lengths: list[int] = []
    if mask is not None and small[mask].numel():
        cut, lengths = _other_lengths(small[mask], _is_step(program, small, mask))
        if not torch.equal(cut, small[mask]):
            shown = ", ".join(map(str, lengths[:ROWS])) + (", ..." if len(lengths) > ROWS else "")
            found.append(Batch(f"other lengths ({shown})", _with(small, {mask: cut}), rows))
    base = found[0].inputs if found else small
    changed = _permuted(program, base, mask)
    if changed:
        found.append(Batch("permuted", _with(base, changed), rows))
    scaled = {i: x * SCALE for i, x in enumerate(base) if _is_data(program.input_names[i], x)}
    if scaled:
        found.append(Batch(f"scaled by {SCALE:g}", _with(base, scaled), rows))
    return found


def mask_of(program: Program, inputs: Sequence[Any]) -> int | None:
    """Which input is the padding mask [batch, sequence], or None."""
    place = program.padding_mask
    index = None if place is None else program.placeholders.index(place)
    return index if index is not None and isinstance(inputs[index], torch.Tensor) else None


def _size(inputs: Sequence[Any], mask: int | None) -> str:
    first = (
        inputs[mask] if mask is not None else next((x for x in inputs if isinstance(x, torch.Tensor)), None)
    )
    return "" if first is None or not first.dim() else " (" + " x ".join(map(str, first.shape)) + ")"


def _with(inputs: Sequence[Any], changed: Mapping[int, Any]) -> list[Any]:
    return [changed.get(i, x) for i, x in enumerate(inputs)]


def _other_lengths(mask: torch.Tensor, last: bool) -> tuple[torch.Tensor, list[int]]:
    """A mask of the same form whose rows have other numbers of real tokens, from one up, and those numbers.

    last: the last columns stay real, as in a step that continues a cache. Else the pads stand where they stood.
    """
    rows, width = mask.shape
    wanted = [width, 1, 2, 3, width // 2, width - 1]
    left = last or _padded_left(mask)
    lengths = [min(max(1, wanted[i % len(wanted)]), width) for i in range(rows)]
    if rows == 1:
        lengths = [max(1, width // 2)]
    at = torch.arange(width, device=mask.device)
    counts = torch.tensor(lengths, device=mask.device)[:, None]
    kept = at >= width - counts if left else at < counts
    return kept.to(mask.dtype), lengths


def _is_step(program: Program, inputs: Sequence[Any], mask: int) -> bool:
    """Whether the mask covers more than the tokens of this call: those of a cache come before them."""
    width = inputs[mask].shape[1]
    tokens = [x for i, x in enumerate(inputs) if i != mask and isinstance(x, torch.Tensor) and x.dim() >= 2]
    return not any(x.shape[:2] == inputs[mask].shape for x in tokens) or width == 1


def _permuted(program: Program, inputs: Sequence[Any], mask: int | None) -> dict[int, Any]:
    """The inputs that change when the batch's rows come in another order, and tokens of text in the reverse one."""
    tensors = [(i, x) for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.dim()]
    if not tensors:
        return {}
    rows = inputs[mask].shape[0] if mask is not None else tensors[0][1].shape[0]
    changed = {i: x.roll(1, 0) for i, x in tensors if x.shape[0] == rows} if rows > 1 else {}
    if not any(_is_data(program.input_names[i], x) for i, x in tensors):  # image tokens keep their places
        for i, x in tensors:
            if program.input_names[i] == "input_ids" and x.dim() == 2:
                changed[i] = changed.get(i, x).flip(1)
    return {i: x for i, x in changed.items() if not torch.equal(x, inputs[i])}


def _is_data(name: str, given: Any) -> bool:
    """Whether an input holds floating-point data of the caller's, such as pixels or embeddings."""
    return (
        isinstance(given, torch.Tensor)
        and given.is_floating_point()
        and given.dim() >= 2
        and not any(word in name for word in _NO_SCALE)
        and bool(given.isfinite().all())
        and float(given.abs().max() if given.numel() else 0.0) < 1e3
    )


def _resized(program: Program, inputs: list[Any]) -> list[Any]:
    """The inputs with few rows and few columns, where both are sizes that the program leaves open; else as they are."""
    known = [value(p) for p in program.placeholders]
    mask = mask_of(program, inputs)
    first = (
        mask if mask is not None else next((i for i, k in enumerate(known) if _open(k, 0) is not None), None)
    )
    if first is None:
        return inputs
    sizes: dict[Any, int] = {}
    columns: set[Any] = set()
    for dim, most in ((0, ROWS), (1, WIDTH)):
        if _open(known[first], dim) is not None and (dim == 0 or mask is not None):
            # torch may give one size a symbol for each input that has it, and leave it open in some of them only
            alike = {_open(k, dim) for k, x in zip(known, inputs) if _as_many(x, inputs[first], dim)}
            if None in alike:
                continue
            sizes.update(
                dict.fromkeys(alike - set(sizes), most if dim == 0 else min(most, inputs[first].shape[1]))
            )
            columns = alike if dim == 1 else columns
    last = mask is not None and _padded_left(inputs[mask])
    for chosen in (sizes, {s: n for s, n in sizes.items() if s not in columns}):
        if chosen and _allowed(known, chosen):
            return [_cut(x, k, chosen, columns, last) for x, k in zip(inputs, known)]
    return inputs


def _padded_left(mask: torch.Tensor) -> bool:
    return bool((mask[:, -1] != 0).all() and not (mask[:, 0] != 0).all())


def _as_many(given: Any, first: torch.Tensor, dim: int) -> bool:
    """Whether an input is as large as the first in a dimension."""
    return isinstance(given, torch.Tensor) and given.dim() > dim and given.shape[dim] == first.shape[dim]


def _open(known: Any, dim: int) -> Any:
    """The symbol that a dimension of a placeholder is, or None for a number or an expression."""
    if (
        not isinstance(known, torch.Tensor)
        or known.dim() <= dim
        or not isinstance(known.shape[dim], torch.SymInt)
    ):
        return None
    size: Any = known.shape[dim]
    expression = size.node.expr
    return expression if expression.is_Symbol else None


def _allowed(known: Sequence[Any], sizes: Mapping[Any, int]) -> bool:
    """Whether these sizes keep what the capture assumed of them, and no other size hangs on them."""
    env = None
    for one in known:
        for size in one.shape if isinstance(one, torch.Tensor) else (one,):
            if isinstance(size, torch.SymInt):
                env, expression = size.node.shape_env, size.node.expr
                if not expression.is_Symbol and expression.free_symbols & set(sizes):
                    return False
    if env is None or any(s in env.replacements for s in sizes):
        return False
    ranges = [(env.var_to_range.get(s), n) for s, n in sizes.items()]
    if any(r is not None and not r.lower <= n <= r.upper for r, n in ranges):
        return False
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    everything = {**hints, **sizes}
    guards = [g.expr for g in env.guards if g.expr.free_symbols & set(sizes)]
    return all(g.xreplace(everything) == True for g in guards)  # noqa: E712  # sympy's own true


def _cut(given: Any, known: Any, sizes: Mapping[Any, int], columns: set[Any], last: bool) -> Any:
    """An input at these sizes: rows in turn from the first, and the first or the last columns."""
    if isinstance(known, torch.SymInt):
        return sizes.get(known.node.expr, given)
    if not isinstance(given, torch.Tensor) or not isinstance(known, torch.Tensor):
        return given
    for dim, size in enumerate(known.shape):
        wanted = sizes.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if wanted is None:
            continue
        if size.node.expr in columns:
            given = given.narrow(dim, given.shape[dim] - wanted if last else 0, wanted)
        else:
            given = given.index_select(dim, torch.arange(wanted, device=given.device) % given.shape[dim])
    return given
