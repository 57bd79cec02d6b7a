"""Sparse MLPs: read only the weights of neurons that are on.

    matched:  down(act(up(x))) and down(act(gate(x)) * up(x)) whose activation has a flat zero
    becomes:  thresher::sparse_down, or thresher::sparse_mlp where the up projection's rows can be skipped too

The rewrite is exact: a neuron that is off adds zero. Each call counts its active neurons and runs
sparse or dense, whichever was measured to be faster, so that a dense model loses nothing. How
sparse a model is, is up to its training: `thresher.density_loss` and `thresher.relufy` (the method DEFT,
arXiv 2402.01911, which gives the loss and no kernel).

GELU and SiLU are never exactly zero. For them `approximate=True` drops small activations under
thresholds from calibration, within an error budget. It is off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.compat import has_values
from thresher.graph.edit import call_before, replace
from thresher.graph.program import Program, Weight, weights_fingerprint

from ..base import EXACT, Context, Match, Miss, Pass, register_pass
from ..calibrate import Tap
from ..structure.linears import PRODUCTS
from ..structure.sites import LinearSite, MlpSite
from .config import DeftConfig
from .sites import FLAT_ZERO, NeuronPlan, read, site_names, up_rows, widest
from .thresholds import HiddenSample, Threshold, choose, curve, neuron_norms, root_mean_square
from .weights import derived, not_finite, stored

aten = torch.ops.aten
_FLAT_ZERO_OPS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.hardswish.default,
                  aten.clamp_min.default}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SparseSite:
    """What `rewrite` needs: the plan, a threshold if it is approximate, and the name the site counts under.

    note: what to say about the site once it is rewritten, or "".
    """

    plan: NeuronPlan
    choice: Threshold | None
    counted: str
    note: str = ""


@register_pass
class Deft(Pass[DeftConfig]):
    """Leaves inactive neurons out of down and up projections. See the module's docstring."""

    name, effect = "deft", EXACT
    per_rank = True

    def exact(self, context: Context[DeftConfig]) -> bool:
        return not context.config.approximate and context.config.bits >= 16

    def budget(self, context: Context[DeftConfig]) -> float:
        return self.effect.budget if self.exact(context) else context.config.budget

    def taps(self, program: Program, context: Context[DeftConfig]) -> Sequence[Any]:
        """The hidden activations of every MLP whose activation has no flat zero."""
        mlps = widest(context.structure().mlps)[0] if context.config.approximate else []
        names = site_names(mlps)
        return [Tap(names[m], m.down.x, HiddenSample) for m in mlps if m.activation not in FLAT_ZERO]

    def match(self, program: Program, context: Context[DeftConfig]) -> Sequence[Match | Miss]:
        config = context.config
        structure = context.structure()
        mlps, beside = widest(structure.mlps)
        names = site_names(mlps)
        found: list[Match | Miss] = list(beside)
        plans: list[NeuronPlan] = []
        for mlp in mlps:
            plan = read(program, mlp, config.bmax, config.min_bytes)
            if not isinstance(plan, str) and config.bits == 4 and plan.shape[1] % 2:
                plan = f"It has {plan.shape[1]} outputs, and 4-bit codes lie two a byte."
            if isinstance(plan, str):
                found.append(Miss(names[mlp], plan))
            elif plan.exact or config.approximate:
                plans.append(plan)
            else:
                found.append(Miss(names[mlp], _needs_relu(mlp)))
        unplaced = {s.fqn for s in structure.linears if not s.role and _reads_flat_zero(s)}
        found += [m for m in structure.missed if m.site in unplaced]
        choices = self._choices(program, {names[p.mlp]: p for p in plans if not p.exact}, context)
        prefix = weights_fingerprint(program)[:8] if plans else ""
        for plan in plans:
            fqn = names[plan.mlp]
            choice = choices.get(fqn)
            if isinstance(choice, str):
                found.append(Miss(fqn, choice))
                continue
            claims, note = [plan.mlp.down.weight_fqn], ""
            if plan.gated and config.skip_up and config.bits == 16:
                claims += [plan.mlp.up.linear.weight_fqn]
                if plan.mlp.fused and not has_values(program.weights[plan.mlp.up.linear.weight].tensor):
                    note = f"{fqn}: its fused projection is split into gate and up."
            elif plan.why_down:
                note = f"{fqn} keeps its up projection dense. {plan.why_down}"
            found.append(Match(fqn, SparseSite(plan, choice, f"{fqn}@{prefix}", note), tuple(claims)))
        return found

    def _choices(
        self, program: Program, plans: dict[str, NeuronPlan], context: Context[DeftConfig]
    ) -> dict[str, Threshold | str]:
        """For each approximate site its threshold, or a sentence why it has none."""
        if not plans:
            return {}
        samples = context.stats.get(self.name, {})
        result: dict[str, Threshold | str] = {}
        curves = {}
        for fqn, plan in plans.items():
            hidden = samples.get(fqn, {}).get("hidden")
            if hidden is None or not hidden.numel():
                result[fqn] = (
                    "Approximate mode needs calibration and there are no statistics of this MLP: run "
                    "thresher.calibrate(model, batches, deft={'approximate': True}).save(path) and compile with stats=path."
                )
                continue
            if (token := not_finite(hidden)) is not None:
                result[fqn] = (
                    f"Its calibrated activations are not finite (sampled token {token}), so no threshold can be set."
                )
                continue
            curves[fqn] = curve(hidden, _neuron_major(program, plan))
        chosen = choose(curves, context.config.error)
        for fqn, choice in chosen.items():
            if choice.density > 0.95:
                result[fqn] = (
                    f"No threshold leaves out a twentieth of its neurons within the error budget {context.config.error:g}; "
                    f"an even share would cost {curves[fqn].errors[1]:.2g} at {curves[fqn].densities[1]:.0%} density."
                )
            else:
                result[fqn] = choice
        return result

    def about(self, done: Sequence[Match], context: Context[DeftConfig]) -> Sequence[str]:
        said = [m.data.note for m in done if m.data.note]
        chosen = [m.data.choice for m in done if m.data.choice is not None]
        if chosen:
            mean = sum(c.density for c in chosen) / len(chosen)
            said.append(
                f"thresholds keep {mean:.0%} of the neurons of {len(chosen)} MLPs (held-out tokens), at an error of "
                f"{root_mean_square([c.error for c in chosen]):.3f} of the MLPs' outputs."
            )
        return said

    def rewrite(self, program: Program, match: Match, context: Context[DeftConfig]) -> None:
        found: SparseSite = match.data
        plan, config = found.plan, context.config
        down = plan.mlp.down
        before = down.output
        bias = stored(program, down.bias, before)
        weight, scale = _down_weight(program, plan, before, config.bits)
        threshold = _threshold(program, found, before) if found.choice is not None else None
        tail = (weight, scale, bias, threshold, config.tau, config.bmax, found.counted)
        if plan.gated and config.skip_up and config.bits == 16:
            _rewrite_gated(program, plan, before, tail)
        else:
            down_rows = torch.ops.thresher.sparse_down.default
            replace(before, call_before(before, down_rows, (down.x, *tail), like=down.node))
        context.counted[match.site] = found.counted


def _down_weight(
    program: Program, plan: NeuronPlan, before: fx.Node, bits: int
) -> tuple[fx.Node, fx.Node | None]:
    """The neuron-major weight and its scales, None for 16 bits."""
    down = plan.mlp.down
    if bits == 16:
        return derived(program, down.weight, before, "neuron_major", not down.transposed, None), None
    parts = [
        derived(
            program, down.weight, before, f"{part}{bits}", not down.transposed, None, form=f"{part}{bits}"
        )
        for part in ("codes", "scales")
    ]
    return parts[0], parts[1]


def _rewrite_gated(program: Program, plan: NeuronPlan, before: fx.Node, tail: tuple[Any, ...]) -> None:
    mlp, up = plan.mlp, plan.mlp.up.linear
    rows = up_rows(mlp.up)
    if mlp.fused:
        assert mlp.gate is not None
        _split_gate(program, mlp)
    weight = derived(program, up.weight, before, "up_rows", up.transposed, rows)
    bias = None
    if up.bias is not None:
        bias = derived(program, up.bias, before, "up_rows", False, rows)
    arguments = (mlp.activation_node, up.x, weight, None, bias, plan.up_act, *tail)
    replace(before, call_before(before, torch.ops.thresher.sparse_mlp.default, arguments, like=mlp.down.node))


def _split_gate(program: Program, mlp: MlpSite) -> None:
    """Give the gate of a fused projection a linear of its own, on its rows of the same weight."""
    gate = mlp.gate
    assert gate is not None
    linear, rows, result = gate.linear, up_rows(gate), gate.result
    weight = derived(program, linear.weight, result, "gate_rows", linear.transposed, rows, checked=False)
    arguments: list[Any] = [linear.x, weight]
    if linear.bias is not None:
        arguments.append(derived(program, linear.bias, result, "gate_rows", False, rows, checked=False))
    replace(result, call_before(result, aten.linear.default, arguments, like=linear.node))


def _threshold(program: Program, found: SparseSite, before: fx.Node) -> fx.Node:
    """The node of a site's fp32 [F] thresholds. They have no recipe: another weight makes them stale."""
    assert found.choice is not None
    down = found.plan.mlp.down
    held = program.weights[down.weight]
    fqn = f"{held.fqn}.threshold"
    for node in program.graph.nodes:
        if node.op == "get_attr" and program.weights[str(node.target)].fqn == fqn:
            return node
        if node is before:
            break
    limits = found.choice.limit / neuron_norms(_neuron_major(program, found.plan))
    return program.get_weight(
        Weight(
            fqn,
            limits.to(held.tensor.device),
            source=held.origins,
            made_from=held.origin_tensors,
        ),
        before,
    )


def _neuron_major(program: Program, plan: NeuronPlan) -> torch.Tensor:
    tensor = program.weights[plan.mlp.down.weight].tensor.detach()
    return tensor if plan.mlp.down.transposed else tensor.t()


def _needs_relu(mlp: MlpSite) -> str:
    return (
        f"Its activation is {mlp.activation}, which is never zero on an interval, so no neuron is ever exactly off. "
        "Swap it with thresher.relufy(model) and fine-tune, or accept a measured error with "
        "deft={'approximate': True} and calibration."
    )


def _reads_flat_zero(linear: LinearSite) -> bool:
    """Whether an activation with a flat zero lies a few steps before a linear."""
    reached = [linear.x]
    for node in reached[:8]:
        if node.target in _FLAT_ZERO_OPS:
            return True
        if node.op == "call_function" and node.target not in PRODUCTS:
            reached += [a for a in node.all_input_nodes[:2] if a.op == "call_function"]
            reached[8:] = []
    return False
