"""Which MLPs can skip the weights of neurons that are off, and how each is written.

`read` gives a NeuronPlan for a site that can, or a sentence why it cannot. Exact sites are those whose
activation has a flat zero: there a neuron that is off is exactly zero, and nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.report import Miss

from ..structure.sites import MlpSite, Projection
from ..structure.views import PARTS, is_view
from .weights import Rows, as_rows, not_finite, take

FLAT_ZERO = ("relu", "relu2", "relu6", "hardswish")
"""Activations that are exactly zero on an interval (hard-swish below -3)."""

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, eq=False)
class NeuronPlan:
    """How one MLP is written.

    gated: skip the up projection's rows as well, with `sparse_mlp`; else `sparse_down`.
    up_act: what the up projection goes through, "identity" or "relu". why_down: why a gated MLP keeps its
    up projection dense, as a sentence, or "".
    """

    mlp: MlpSite
    exact: bool
    gated: bool
    up_act: str = "identity"
    why_down: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D): neurons and output features."""
        return self.mlp.down.in_features, self.mlp.down.out_features


def widest(mlps: Sequence[MlpSite]) -> tuple[list[MlpSite], list[Miss]]:
    """One MLP for each hidden value: where several linears read it (LoRA beside W2), the widest."""
    by_hidden: dict[fx.Node, list[MlpSite]] = {}
    for mlp in mlps:
        by_hidden.setdefault(mlp.hidden, []).append(mlp)
    kept, beside = [], []
    for group in by_hidden.values():
        first = max(group, key=lambda m: m.down.out_features)
        kept.append(first)
        beside += [
            Miss(
                m.down.fqn,
                f"It reads what {first.down.fqn} reads and has {m.down.out_features} outputs against "
                f"{first.down.out_features}; such a narrow branch, a LoRA adapter for instance, stays dense. Merge adapters "
                "into the model's weights to be rid of it.",
            )
            for m in group
            if m is not first
        ]
    return kept, beside


def site_names(mlps: Sequence[MlpSite]) -> dict[MlpSite, str]:
    """The module that holds an MLP; its down projection where that is the model itself, or another MLP's too."""
    holders: dict[str, set[str]] = {}
    for m in mlps:
        holders.setdefault(m.fqn, set()).add(m.down.weight_fqn)
    return {m: m.fqn if m.fqn and len(holders[m.fqn]) == 1 else m.down.fqn for m in mlps}


def read(program: Program, mlp: MlpSite, bmax: int, min_bytes: int) -> NeuronPlan | str:
    """How to write this MLP, or a sentence why it is left as it is."""
    down = mlp.down
    weight = program.weights[down.weight]
    x, out = value(down.x), value(down.output)
    if weight.source and weight.derive is None:
        return (
            f"{down.weight_fqn} is computed by another pass from data that is not at hand, and deft computes its own "
            "anew when the model's weight changes."
        )
    accepted = DTYPES.get(x.device.type, ())
    if x.dtype not in accepted:
        names = " and ".join(str(d).removeprefix("torch.") for d in accepted) or "nothing"
        return f"Its activations are {x.dtype} on {x.device.type}, where the sparse kernels compute {names}."
    if weight.tensor.dtype != x.dtype or out.dtype != x.dtype:
        return (
            f"Its activations are {x.dtype} and {down.weight_fqn} is {weight.tensor.dtype}; the kernels take one "
            "dtype. Convert the model instead of using autocast."
        )
    bias = program.weights[down.bias].tensor if down.bias is not None else None
    if bias is not None and bias.dtype != x.dtype:
        return f"The bias of {down.fqn} is {bias.dtype}, and its activations are {x.dtype}."
    tokens = prod(x.shape[:-1])
    if isinstance(tokens, int) and tokens > bmax:
        return (
            f"This graph computes {tokens} tokens a call, more than bmax = {bmax}: only neurons that are off for all tokens "
            "of a call can be skipped, and so many tokens rarely leave one."
        )
    size = weight.tensor.numel() * weight.tensor.element_size()
    if size < min_bytes:
        return (
            f"{down.weight_fqn} has {size:,} bytes, below min_bytes = {min_bytes:,}: reading all of it costs less "
            "than finding out what to skip."
        )
    neurons = weight.tensor if down.transposed else weight.tensor.t()
    if (neuron := not_finite(neurons)) is not None:
        return _laundered(down.weight_fqn, neuron)
    exact = mlp.activation in FLAT_ZERO
    gated, up_act, why = False, "identity", ""
    if mlp.gate is not None and exact:
        skip = _skips_up(program, mlp)
        gated, up_act, why = (True, skip, "") if skip in ("identity", "relu") else (False, "identity", skip)
    return NeuronPlan(mlp, exact, gated, up_act, why)


def _laundered(fqn: str, neuron: int) -> str:
    return (
        f"{fqn} is not finite for neuron {neuron}: the dense product is NaN even while that neuron is off, and a "
        "sparse one would hide it. Repair the weight."
    )


def _skips_up(program: Program, mlp: MlpSite) -> str:
    """ "identity" or "relu" when the up projection's rows can be skipped, else a sentence why not."""
    up, gate = mlp.up, mlp.gate
    assert gate is not None
    held = program.weights[up.linear.weight]
    if up.linear is mlp.down or (held.source and held.derive is None):
        return f"{up.linear.weight_fqn} is computed by another pass."
    act = mlp.up_activation or "identity"
    if act not in ("identity", "relu"):
        return f"Its up projection goes through {act}."
    if not _only_for(up, mlp):
        return f"Something beside the MLP reads {up.linear.fqn} or the MLP's hidden values."
    x, a, down_x = value(up.linear.x), value(mlp.activation_node), value(mlp.down.x)
    weight = program.weights[up.linear.weight].tensor
    if not x.dtype == a.dtype == down_x.dtype == weight.dtype:
        return (
            f"Its values are {x.dtype}, {a.dtype} and {down_x.dtype}, and its up projection {weight.dtype}."
        )
    if a.dim() != down_x.dim() or x.dim() != a.dim() or a.shape[-1] != down_x.shape[-1]:
        return "Its gate is laid out otherwise than the input of its down projection."
    bias = program.weights[up.linear.bias].tensor if up.linear.bias is not None else None
    if bias is not None and (bias.dtype != x.dtype or not_finite(bias) is not None):
        return f"The bias of {up.linear.fqn} is {bias.dtype}, or is not finite."
    rows = take(weight.t() if up.linear.transposed else weight, up_rows(up))
    if (neuron := not_finite(rows)) is not None:
        return _laundered(up.linear.weight_fqn, neuron)
    return act


def up_rows(operand: Projection) -> Rows:
    """Which rows of its linear's [out, in] weight a projection is."""
    return as_rows(operand.rows, operand.linear.out_features)


def _only_for(up: Projection, mlp: MlpSite) -> bool:
    """Whether all that comes out of the up projection goes into this MLP's down projection."""
    ends = {mlp.down.node, mlp.down.output}
    node = up.result
    for _ in range(16):  # activation, product, cast and reshapes: a chain of single readers
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
        if node in ends:
            return not mlp.fused or _splits_only(up.linear.output, {up.result, mlp.gate.result})  # type: ignore[union-attr]
    return False


def _splits_only(output: fx.Node, parts: set[fx.Node]) -> bool:
    """Whether a fused projection's output is read through these parts of it only."""
    if output in parts:
        return False
    reached = [output]
    for node in reached:
        for user in node.users:
            if user in parts:
                continue
            if not (is_view(user) or user.target in PARTS):
                return False
            reached.append(user)
    return True
