"""What RSQ does to each weight of a model: a plan made from the recovered structure, before anything is edited.

An `Edit` says how one linear's weight changes: the norm fused into its input side, the rotations of its input
and of its output. Streams that cannot be rotated, and sites that cannot be quantised, are Misses with the
reason; the rest of the plan stands without them.
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from thresher.formats.hadamard import decompose
from thresher.graph.program import Program
from thresher.report import Miss

from ..keep import kept_experts, kept_layers
from ..structure.experts import by_weight
from ..structure.recover import AttentionSite, Structure
from ..structure.sites import by_module
from .config import RSQConfig
from .edits import RotationPlan
from .fit import unfit, unfit_experts
from .latents import plan_latents
from .rotation import Rotation, rotation
from .shared import calls, settle_shared
from .stream import NotRotatable, follow

STREAM_SEED, HEAD_SEED, DOWN_SEED, INPUT_SEED = 0, 1, 2, 3  # added to the seed, so that rotations differ
SHARED = "{} linears are called again, {} times in all: one set of codes serves all calls of each."
_LEAST_BLOCK = 4  # of an online transform of inputs: smaller ones spread nothing


def make_plan(program: Program, structure: Structure, config: RSQConfig) -> RotationPlan:
    """The plan for a program; a pure function of its arguments."""
    plan = RotationPlan()
    if config.rotate:
        _plan_streams(program, structure, config, plan)
        for site in structure.attentions:
            plan_latents(structure, site, config, plan)
    if config.rotate_heads:
        for site in structure.attentions:
            _plan_heads(structure, site, config, plan)
    if config.rotate_down:
        for mlp in structure.mlps:
            kind = "block" if config.rotation in ("auto", "block") else config.rotation
            if kind == "orthogonal":
                plan.missed.append(
                    Miss(mlp.down.fqn, "A dense orthogonal rotation cannot run online; use rotation='auto'.")
                )
                continue
            plan.edit(mlp.down).online = rotation(mlp.width, config.seed + DOWN_SEED, kind)
    words = [w for w in config.keep if w != "head"] if config.head_bits else config.keep
    kept = kept_layers(structure, words, plan.notes)
    for first, *others in by_module(structure.linears):
        reasons = (kept.get(s) or unfit(program, s, config, 1 + len(others)) for s in (first, *others))
        reason = next((r for r in reasons if r is not None), None)
        if reason is not None:
            plan.missed.append(Miss(first.fqn, reason))
            continue
        for linear in (first, *others):
            plan.edit(linear)
        plan.quantise.append(first)
        if others:
            plan.again[first] = tuple(others)
    if config.rotate and config.rotate_inputs:
        _plan_inputs(config, plan)
    settle_shared(plan)
    if plan.again:
        plan.notes.append(SHARED.format(len(plan.again), sum(map(len, plan.again.values()))))
    kept_apart = kept_experts(structure, config.keep)
    for group in by_weight(structure.experts):
        reason = kept_apart.get(group[0]) or unfit_experts(program, group, config)
        if reason is not None:
            plan.missed.append(Miss(group[0].fqn, reason))
        else:
            plan.experts.append(group[0])
    said: dict[str, int] = {}
    for edit in plan.edits.values():
        down = edit.site.role == "down"
        for name, r in (("R2", edit.heads_in), ("R4" if down else "Inputs turned online", edit.online)):
            if r is not None:
                said[f"{name}: {r.note}"] = said.get(f"{name}: {r.note}", 0) + 1
    plan.notes += [f"R1: {r.note}" for _, r in plan.streams]
    for note, count in Counter(r.note for _, r in plan.latents).items():
        plan.notes.append(f"Latents: {note} {count} sites.")
    plan.notes += [f"{note} {count} sites." for note, count in said.items()]
    plan.missed += [m for m in structure.missed if m.site not in {x.site for x in plan.missed}]
    return plan


def _plan_streams(program: Program, structure: Structure, config: RSQConfig, plan: RotationPlan) -> None:
    if not structure.towers:
        plan.missed.append(
            Miss("the residual stream", "No residual stream was recovered, so nothing is rotated.")
        )
    for tower in structure.towers:
        name = tower.layers[0].fqn.rsplit(".", 1)[0] if tower.layers else "tower"
        try:
            stream = follow(program, structure, tower)
            taken = [
                s.fqn for readers in stream.norms.values() for s in readers if plan.edit(s).norm is not None
            ]
            if taken:
                raise NotRotatable(f"{taken[0]} reads two streams.")
        except NotRotatable as reason:
            plan.missed.append(Miss(f"{name} (rotation of the residual stream)", str(reason)))
            continue
        r = rotation(stream.width, config.seed + STREAM_SEED, config.rotation)
        plan.streams.append((stream, r))
        for norm, readers in stream.norms.items():
            for site in readers:
                edit = plan.edit(site)
                edit.norm, edit.reads = norm, r
        for site in stream.writers:
            edit = plan.edit(site)
            edit.writes, edit.centred = r, stream.centred
        head = structure.head
        token = tower.token_embedding
        if head is not None and token is not None and head.weight == token.weight:
            held = program.weights[head.weight].tensor
            plan.notes.append(
                f"Embedding and head share {head.weight_fqn}; rotated they differ, and the head's own copy takes "
                f"{held.numel() * held.element_size() / 1e6:.0f} MB more."
            )


def _plan_heads(structure: Structure, site: AttentionSite, config: RSQConfig, plan: RotationPlan) -> None:
    layer = structure.layer_of(site)
    cached = site.past is not None or (_leaves(site) if layer is None else bool(layer.exports))
    if site.kv_latent is not None:  # its cache holds latents, or else the values that are made of them
        cached = (site.past is not None and site.kv_latent.past is None) or _leaves(site)
    reason = None
    if site.v.rows.shape != (site.kv_heads, site.value_dim):
        reason = "The rows of its value heads are not all known."
    elif site.o.in_features != site.heads * site.value_dim:
        reason = "Its output projection reads more than the heads."
    elif site.v.linear in (site.q.linear, site.k.linear) and _overlap(site):
        reason = "Its values share weights with its queries or keys."
    r = rotation(site.value_dim, config.seed + HEAD_SEED, config.rotation)
    if reason is None and cached and not (site.v.whole and _symmetric(r)):
        reason = (
            "Its values leave the graph as a cache and would come out rotated, and only unfused value projections "
            "with a power of two as head size are turned back. Compile with use_cache=False, or quantize with "
            "rotate_heads=False."
        )
    if reason is not None:
        plan.missed.append(Miss(f"{site.fqn} (rotation of its heads)", reason))
        return
    out = plan.edit(site.v.linear)
    out.heads_out, out.rows, out.cached = r, site.v.rows, cached
    into = plan.edit(site.o)
    into.heads_in, into.cached = r, cached


def _leaves(site: AttentionSite) -> bool:
    """Whether the values come out of the graph, as for a cache, by a way around the attention."""
    seen: set[fx.Node] = set()
    stack = [site.v.linear.output]
    while stack:
        node = stack.pop()
        if node.op == "output":
            return True
        if node not in seen and node is not site.node:
            seen.add(node)
            stack += node.users
    return False


def _plan_inputs(config: RSQConfig, plan: RotationPlan) -> None:
    """Turn online what quantised linears read, where neither a stream nor heads are rotated for them: exact whatever
    stands before and after, such as norms behind the branches. Linears that read one value share its transform."""
    made: dict[int, Rotation] = {}
    kind = "block" if config.rotation in ("auto", "block") else config.rotation
    if kind == "orthogonal":  # it cannot run online, which the down projections' misses say
        return
    for edit in [plan.edit(s) for first in plan.quantise for s in calls(plan, first)]:
        site = edit.site
        if edit.reads is None and edit.heads_in is None and edit.online is None:
            width = site.in_features
            r = made.setdefault(width, rotation(width, config.seed + INPUT_SEED, kind))
            if r.block >= _LEAST_BLOCK:
                edit.online = r
    plan.notes += [
        f"Inputs of width {width} are not turned: the largest Hadamard blocks that divide it are of order {r.block}."
        for width, r in made.items()
        if r.block < _LEAST_BLOCK
    ]


def _overlap(site: AttentionSite) -> bool:
    rows = set(site.v.rows.flatten().tolist())
    return any(
        part.linear is site.v.linear and rows & set(part.rows.flatten().tolist()) for part in (site.q, site.k)
    )


def _symmetric(r: Rotation) -> bool:
    """Sylvester's matrix is its own transpose, so that the rotation can be undone by the same operator."""
    return r.block == r.order and decompose(r.order) == ((), r.order)
