"""Finds MLPs: two linears with an activation between them, or three with a gate.

down(act(up(x)))            down(act(gate(x)) * up(x))          gate and up may be one fused linear
                            down(act(gate(x)) * act(up(x)))     dReLU: the up projection is activated too
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .pattern import Var, call, either, match, uncast
from .sites import LinearSite, MlpSite, Projection, Unknown, common_prefix
from .views import Unviewable, behind_views, feature_rows, is_view, viewed

aten = torch.ops.aten

_x = Var("x", through_casts=True)


def relu(x: Any) -> Any:
    """Every spelling of max(x, 0)."""
    return either(
        call(aten.relu.default)(x), call(aten.clamp_min.default)(x, 0), call(aten.clamp.default)(x, 0)
    )


mul, add = call(aten.mul.Tensor), call(aten.add.Tensor)
tanh, sigmoid = call(aten.tanh.default), call(aten.sigmoid.default)
pow_ = call(aten.pow.Tensor_Scalar)

_ROOT = 0.7978845608028654  # sqrt(2 / pi)
_cubic = add(_x, mul(pow_(_x, 3.0), 0.044715))
_factored = mul(mul(_x, _ROOT), add(mul(mul(_x, 0.044715), _x), 1.0))
_over_root_two = either(mul(_x, 0.7071067811865476), call(aten.div.Tensor)(_x, 1.4142135623730951))

ACTIVATIONS: Sequence[tuple[str, Any]] = (
    ("relu", relu(_x)),
    ("relu6", either(call(aten.relu6.default)(_x), call(aten.hardtanh.default)(_x, 0.0, 6.0))),
    ("relu2", either(call(aten.square.default)(relu(_x)), pow_(relu(_x), 2), mul(relu(_x), relu(_x)))),
    ("gelu", either(call(aten.gelu.default)(_x), call(aten.gelu.default)(_x, approximate="none"))),
    ("gelu_tanh", call(aten.gelu.default)(_x, approximate="tanh")),
    ("gelu_tanh", mul(mul(_x, 0.5), add(tanh(either(mul(_cubic, _ROOT), _factored)), 1.0))),
    ("gelu", mul(mul(_x, 0.5), add(call(aten.erf.default)(_over_root_two), 1.0))),
    ("silu", either(call(aten.silu.default)(_x), mul(_x, sigmoid(_x)))),
    ("quick_gelu", mul(_x, sigmoid(mul(_x, 1.702)))),
    ("hardswish", call(aten.hardswish.default)(_x)),
    ("elu", call(aten.elu.default)(_x)),
    ("mish", call(aten.mish.default)(_x)),
)
"""Names and expressions. The tanh form of GELU has one name, as one operator or spelled out."""

_GATES = (*ACTIVATIONS, ("sigmoid", sigmoid(_x)))
"""A plain sigmoid is an MLP's activation only where it gates."""


def find_mlp(down: LinearSite, by_output: dict[fx.Node, LinearSite]) -> MlpSite | None:
    """The MLP that ends in this linear, or None when it ends no MLP. Raises Unknown."""
    hidden = uncast(behind_views(down.x))
    plain = _activated(hidden, ACTIVATIONS)
    if plain is not None:
        name, before = plain
        up = _operand(before, by_output)
        return _site(down, up, None, name, hidden) if up is not None else None
    if hidden.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in hidden.args):
        return None
    for gated, other in (hidden.args, reversed(hidden.args)):
        acted = _activated(uncast(gated), _GATES)
        if acted is None:
            continue
        name, before = acted
        gate, up = _operand(before, by_output), _operand(uncast(other), by_output)
        up_name = ""
        if up is None and (acted_up := _activated(uncast(other), ACTIVATIONS)) is not None:
            up_name, up = acted_up[0], _operand(acted_up[1], by_output)
        if gate is not None and up is not None:
            return _site(down, up, gate, name, uncast(gated), up_name)
    return None


def _activated(node: Any, activations: Sequence[tuple[str, Any]]) -> tuple[str, fx.Node] | None:
    """Name and input of the activation whose result is `node`."""
    for name, pattern in activations:
        found = match(pattern, node)
        if found:
            return name, found["x"]
    return None


def _operand(node: Any, by_output: dict[fx.Node, LinearSite]) -> Projection | None:
    """The linear, and which of its features, behind views of its output."""
    result, steps = node, []
    while isinstance(node, fx.Node) and node not in by_output:
        if not is_view(node):
            return None
        steps.append(node)
        node = viewed(node)
    if not isinstance(node, fx.Node):
        return None
    linear = by_output[node]
    try:
        rows = feature_rows(node, linear.out_features, steps[::-1])
    except Unviewable:
        return None
    whole = torch.equal(rows, torch.arange(linear.out_features))
    return Projection(linear, rows, whole, result)


def _site(
    down: LinearSite, up: Projection, gate: Projection | None, name: str, acted: fx.Node, up_name: str = ""
) -> MlpSite:
    operands = [up] if gate is None else [gate, up]
    for operand in operands:
        if len(operand.rows) != down.in_features:
            raise Unknown(
                f"{operand.linear.fqn} gives {len(operand.rows)} values where {down.fqn} reads "
                f"{down.in_features}, so the two are not the halves of one MLP."
            )
    if gate is not None:
        if gate.linear.x is not up.linear.x:
            raise Unknown(
                f"Its gate {gate.linear.fqn} reads {gate.linear.x.name} and its up projection "
                f"{up.linear.fqn} reads {up.linear.x.name}; in an MLP both read the same value."
            )
        if gate.linear is up.linear and torch.isin(gate.rows, up.rows).any():
            raise Unknown(f"Gate and up projection take overlapping parts of {up.linear.fqn}.")
    fqn = common_prefix([o.linear.fqn for o in operands] + [down.fqn])
    return MlpSite(fqn, up, gate, down, name, acted, uncast(behind_views(down.x)), up_name)
