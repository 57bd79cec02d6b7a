"""Carries out a plan's rotations on a program: norms without weights, rotated embeddings and linears.

The sites of the structure are moved along, so that after it they describe the rotated graph. With `lazy=True`
the new weights hold no values; `materialise` computes one from the model's, in any precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from thresher.compat import has_values
from thresher.graph.edit import replace
from thresher.graph.nodes import value
from thresher.graph.program import Program, Weight

from ..structure.recover import NormSite, Structure
from ..structure.sites import read_instead
from .edits import Edit, RotationPlan
from .rotation import Rotation, centre_writer, rotate_reader
from .stream import Stream

aten = torch.ops.aten
ops = torch.ops.thresher
SUFFIX = ".rotated"


def materialise(weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A weight's values, computed from its sources in `dtype` (default: their own)."""
    if weight.derive is None:
        return (
            weight.tensor
            if dtype is None or not weight.tensor.is_floating_point()
            else weight.tensor.to(dtype)
        )
    sources = [t if dtype is None else t.to(dtype) for t in weight.made_from]
    with torch.no_grad():
        return weight.derive(*sources)


def rotate(program: Program, plan: RotationPlan, lazy: bool = False) -> None:
    """Rotate every stream and linear of the plan in place. Linears become `aten.linear` on derived weights."""
    for stream, r in plan.streams:
        _rotate_stream(program, stream, r, plan, lazy)
    for norm, _ in plan.latents:
        _strip_norm(program, norm, plan)
    for edit in plan.edits.values():
        if edit.changes or edit.transposed:  # codes are [out, in], however the model stores the weight
            _rotate_linear(program, edit, plan, lazy)


def _rotate_stream(program: Program, stream: Stream, r: Rotation, plan: RotationPlan, lazy: bool) -> None:
    for embedding in stream.tower.embeddings:
        table = embedding.node.args[0]
        held = program.weights[str(table.target)]  # type: ignore[union-attr]

        def turn(weight: torch.Tensor) -> torch.Tensor:
            if stream.centred:
                weight = centre_writer(weight.t(), None)[0].t()
            return rotate_reader(weight, r).contiguous()

        fqn = f"{embedding.fqn}{SUFFIX}.weight"
        node = derived(program, fqn, [held], turn, held.tensor.shape, embedding.node, lazy)
        embedding.node.replace_input_with(table, node)  # type: ignore[arg-type]
        embedding.weight = str(node.target)
    for norm in stream.norms:
        _strip_norm(program, norm, plan)


def _strip_norm(program: Program, norm: NormSite, plan: RotationPlan) -> None:
    """The norm without its weight, and of a centred stream: x / sqrt(mean(x^2) + eps)."""
    x = norm.input
    old = norm.output
    new = program.insert(old, aten.rms_norm.default, x, [value(x).shape[-1]], None, norm.eps)
    if value(new).dtype != value(old).dtype:
        new = program.insert(old, aten.to.dtype, new, value(old).dtype)
    _replace(program, old, new, plan)
    norm.output = new


def _rotate_linear(program: Program, edit: Edit, plan: RotationPlan, lazy: bool) -> None:
    site = edit.site
    before = site.output
    weight, bias = edited_weights(program, edit)
    shape = (site.out_features, site.in_features)
    x = _input(program, edit, plan, before)
    w = derived(program, f"{site.fqn}{SUFFIX}.weight", weight.held, weight.make, shape, before, lazy)
    args: tuple[Any, ...] = (x, w)
    if bias is not None:
        args += (derived(program, f"{site.fqn}{SUFFIX}.bias", bias.held, bias.make, shape[:1], before, lazy),)
    node = program.insert(before, aten.linear.default, *args)
    result = restore_values(program, edit, node, before)
    _replace(program, before, result, plan)
    site.x, site.node, site.output = x, node, node
    site.weight, site.transposed = str(w.target), False
    site.bias = str(args[2].target) if bias is not None else None


def _input(program: Program, edit: Edit, plan: RotationPlan, before: fx.Node) -> fx.Node:
    """What the rotated linear reads: its input, turned online where the plan says so."""
    x = edit.site.x
    if edit.online is not None:
        key = (x, id(edit.online))  # linears that read one value and share the rotation share its transform
        if key not in plan.turned:
            first = next(n for n in _following(x) if n in x.users)
            plan.turned[key] = _hadamard(program, x, edit.online, 1, edit.site.fqn, first)
        return plan.turned[key]
    if edit.heads_in is not None and edit.cached:
        return _hadamard(
            program, x, edit.heads_in, edit.site.in_features // edit.heads_in.order, edit.site.fqn, before
        )
    return x


def _following(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def restore_values(program: Program, edit: Edit, node: fx.Node, before: fx.Node) -> fx.Node:
    """Values turned back, where a cache must hold them as the model does: x H diag(signs)."""
    if edit.heads_out is None or not edit.cached:
        return node
    r = edit.heads_out
    back = program.insert(before, ops.hadamard.default, node, None, r.block)
    signs = _signs(
        program, r, edit.site.out_features // r.order, f"{edit.site.fqn}.value_signs", before, node
    )
    return back if signs is None else program.insert(before, aten.mul.Tensor, back, signs)


def _hadamard(program: Program, x: fx.Node, r: Rotation, copies: int, fqn: str, before: fx.Node) -> fx.Node:
    signs = _signs(program, r, copies, f"{fqn}.input_signs", before, x)
    return program.insert(before, ops.hadamard.default, x, signs, r.block)


def _signs(
    program: Program, r: Rotation, copies: int, fqn: str, before: fx.Node, like: fx.Node
) -> fx.Node | None:
    """The rotation's signs as a weight read before a node, in the dtype of `like`; None where there are none."""
    if r.signs is None:
        return None
    near = value(like)
    signs = r.signs.to(near.dtype).repeat(copies).to(near.device)
    return program.get_weight(Weight(f"constant.{fqn}", signs), before=before)


@dataclasses.dataclass(frozen=True)
class RowWise:
    """A derivation whose every row comes from the same row of what it is made from, so that a large head can be computed
    in parts. cut: which of its tensors have such rows; the others are read whole."""

    make: Callable[..., torch.Tensor]
    cut: tuple[bool, ...]

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.make(*tensors)

    def rows(self, tensors: Sequence[torch.Tensor], chosen: slice, dtype: torch.dtype) -> torch.Tensor:
        """The chosen rows, computed in `dtype`."""
        parts = (t[chosen] if cut else t for t, cut in zip(tensors, self.cut, strict=True))
        return self.make(*(t.to(dtype) for t in parts))


@dataclasses.dataclass(frozen=True)
class Derivation:
    """Weights of the model, and how a new one is computed from their tensors."""

    held: list[Weight]
    make: Callable[..., torch.Tensor]


def edited_weights(program: Program, edit: Edit) -> tuple[Derivation, Derivation | None]:
    """How the weight and the bias of an edited linear are computed."""
    site, norm = edit.site, edit.norm
    names = [site.weight, site.bias, norm.weight if norm else None, norm.bias if norm else None]
    present = [n is not None for n in names]
    held = [program.weights[n] for n in names if n is not None]

    def all_four(tensors: Sequence[torch.Tensor]) -> list[Any]:
        left = iter(tensors)
        return [next(left) if there else None for there in present]

    def weight(*tensors: torch.Tensor) -> torch.Tensor:
        return edit.apply(*all_four(tensors))[0]

    def bias(*tensors: torch.Tensor) -> torch.Tensor:
        made = edit.apply(*all_four(tensors))[1]
        assert made is not None
        return made

    has_bias = present[1] or present[3]
    cut = tuple(rows for rows, there in zip((True, True, False, False), present) if there)
    make = weight if edit.transposed or edit.writes or edit.heads_out else RowWise(weight, cut)
    return Derivation(held, make), Derivation(held, bias) if has_bias else None


def derived(
    program: Program,
    fqn: str,
    held: Sequence[Weight],
    make: Callable[..., torch.Tensor],
    shape: Sequence[int],
    before: fx.Node,
    lazy: bool,
) -> fx.Node:
    """A read, before a node, of a new weight computed from others. lazy: without values."""
    tensors = tuple(w.tensor for w in held)
    sources = tuple(fqn for w in held for fqn in w.origins)
    like, mode = held[0].tensor, program.fake_mode()
    if lazy or not has_values(like):
        assert mode is not None
        with mode:
            tensor = torch.empty(tuple(shape), dtype=like.dtype, device=value(before).device)
    else:
        with torch.no_grad():
            tensor = make(*tensors)
    return program.get_weight(Weight(fqn, tensor, sources, make, tensors), before=before)


def _replace(program: Program, old: fx.Node, new: fx.Node, plan: RotationPlan) -> None:
    """Read the new node instead of the old one, also where the structure points to it."""
    replace(old, new)
    read_instead([*(edit.site for edit in plan.edits.values()), *plan.experts], old, new)


def rebind_layers(program: Program, structure: Structure) -> None:
    """Find each layer's nodes and inputs again, after rotation changed the graph."""
    from ..structure.layers import bound

    for layer in structure.layers:
        layer.nodes, layer.inputs, layer.exports = [], [], []
    for tower in structure.towers:
        bound(tower.layers, program)
