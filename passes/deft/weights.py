"""Neuron-major weights of sparse MLPs, computed from a model's own and followed when those change.

Row i of a neuron-major weight is what neuron i alone needs, [F, D]. A weight that the model already
stores so (Conv1D's, an nn.Linear's up projection, a strided down projection) is viewed, not copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import fx

from thresher.compat import has_values
from thresher.errors import ThresherError
from thresher.graph.program import Program, Weight

from . import quant as deft_quant

Rows = tuple[int, ...] | slice | None
"""Which of a linear's features are the neurons: all, a range, or a list in the neurons' order."""


def as_rows(rows: torch.Tensor, total: int) -> Rows:
    """The shortest way to say these features of `total`."""
    first, size = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + size)):
        return None if size == total else slice(first, first + size)
    return tuple(rows.tolist())


def take(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """These rows of dimension 0: a view where they are a range."""
    if rows is None:
        return tensor
    return tensor[rows] if isinstance(rows, slice) else tensor[list(rows)]


def not_finite(tensor: torch.Tensor) -> int | None:
    """The first index of dimension 0 that holds an infinity or a NaN, or None."""
    if not has_values(tensor) or bool(tensor.isfinite().all()):
        return None
    return int((~tensor.isfinite()).reshape(tensor.shape[0], -1).any(1).nonzero()[0])


def _derive(
    fqn: str, transpose: bool, rows: Rows, checked: bool, form: str, weight: torch.Tensor
) -> torch.Tensor:
    found = take(weight.t() if transpose else weight, rows)
    if checked and (neuron := not_finite(found)) is not None:
        raise ThresherError(
            f"{fqn} changed after compiling and is not finite for neuron {neuron}. A sparse MLP would hide that "
            "while the neuron is off. Repair the weight, or compile the model again without deft."
        )
    return _formed(found, form)


def _formed(rows: torch.Tensor, form: str) -> torch.Tensor:
    """Neuron-major rows as they are (""), or as "codes8", "scales8", "codes4", "scales4"."""
    if not form:
        return rows.contiguous()
    return (deft_quant.codes if form.startswith("codes") else deft_quant.scales)(rows, int(form[-1]))


def derived(
    program: Program,
    name: str,
    before: fx.Node,
    suffix: str,
    transpose: bool,
    rows: Rows,
    checked: bool = True,
    form: str = "",
) -> fx.Node:
    """A node that holds the stored weight's (or bias's) rows, made once for all sites that share it.

    name: attribute name of the stored tensor. suffix: what the new one is called after it. checked: recomputing
    it raises for values that are not finite. form: see `_formed`.
    """
    stored = program.weights[name]
    fqn = f"{stored.fqn}.{suffix}"
    for node in program.graph.nodes:
        if node.op == "get_attr" and program.weights[str(node.target)].fqn == fqn:
            return node
        if node is before:
            break
    derive: Callable[..., torch.Tensor] = functools.partial(
        _derive, stored.fqn, transpose, rows, checked, form
    )
    with torch.no_grad():
        own = stored.tensor.detach()
        tensor = _formed(take(own.t() if transpose else own, rows), form)
    held = Weight(fqn, tensor, stored.origins, stored.then(derive), stored.origin_tensors)
    return program.get_weight(held, before=before)


def stored(program: Program, name: str | None, before: fx.Node) -> fx.Node | None:
    """The node that reads a stored weight, or None for no weight."""
    if name is None:
        return None
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) == name:
            return node
        if node is before:
            break
    raise LookupError(f"{name} is read nowhere before {before.name}")
