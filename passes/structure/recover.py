"""Recovers the transformer from a Program, once, for every pass to read.

`recover` follows the data: linears and norms first, then the attention and MLP sites between them, then
the residual stream that the sites hang on, and from its additions the layers. Module names come from
the weights' names and are labels, not evidence. Whatever looks like a part of a transformer and was not
understood is in `missed`, with the reason.

    structure = recover(program)
    for layer in structure.layers:
        layer.attention.q.linear.weight_fqn, layer.mlp.activation, layer.inputs
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program
from thresher.report import Miss

from . import attention as structure_attention
from . import mlp as structure_mlp
from .embeddings import find_embeddings
from .experts import ExpertSite, find_experts, mark_routers
from .layers import bound, build_layers
from .linears import find_linears
from .norms import find_norms
from .pattern import described
from .sites import AttentionSite, LinearSite, MlpSite, NormSite, Projection, Rope, Unknown
from .stream import Norms, find_branches, link
from .tower import Branch, EmbeddingSite, LayerSite, Tower
from .views import behind_views

__all__ = ["AttentionSite", "Branch", "EmbeddingSite", "ExpertSite", "LayerSite", "LinearSite", "MlpSite", "NormSite",
           "Projection", "Rope", "Structure", "Tower", "recover"]  # fmt: skip

aten = torch.ops.aten


@dataclass
class Structure:
    """The transformer in a Program. Lists are in graph order; `missed` says what was not understood."""

    linears: list[LinearSite] = field(default_factory=list)
    norms: list[NormSite] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    mlps: list[MlpSite] = field(default_factory=list)
    experts: list[ExpertSite] = field(default_factory=list)
    towers: list[Tower] = field(default_factory=list)
    head: LinearSite | None = None
    missed: list[Miss] = field(default_factory=list)

    @property
    def layers(self) -> list[LayerSite]:
        return [layer for tower in self.towers for layer in tower.layers]

    @property
    def embeddings(self) -> list[EmbeddingSite]:
        return [e for tower in self.towers for e in tower.embeddings]

    @property
    def final_norm(self) -> NormSite | None:
        """The last tower's."""
        return self.towers[-1].final_norm if self.towers else None

    def layer_of(self, site: AttentionSite | MlpSite | LinearSite | ExpertSite) -> LayerSite | None:
        """The layer that a site lies in; None for one on no residual stream. Experts lie where their module does."""
        if isinstance(site, ExpertSite):
            return next((l for l in self.layers if l.fqn and site.fqn.startswith(f"{l.fqn}.")), None)
        for layer in self.layers:
            for branch in layer.branches:
                if branch.site is site or site in branch.site.linears:
                    return layer
        return None

    def linear(self, weight_fqn: str) -> LinearSite | None:
        """The linear that multiplies by the model's weight of that name."""
        return next((s for s in self.linears if s.weight_fqn == weight_fqn), None)

    def summary(self) -> dict[str, Any]:
        """One row for a table: counts, and the words that describe the architecture."""
        attention = next(iter(self.attentions), None)
        return {
            "layers": f"{sum(layer.complete for layer in self.layers)} of {len(self.layers)}",
            "norms": _words(f"{n.kind}{' 1+w' if n.offset else ''}" for n in self.norms),
            "place": _words(
                layer.norm_position + (", parallel" if layer.parallel else "") for layer in self.layers
            ),
            "attention": _words(f"{a.spelling}, {_made(a)}" for a in self.attentions),
            "heads": f"{attention.heads}/{attention.kv_heads}" if attention else "",
            "rope": _words(a.rope.kind if a.rope else "no" for a in self.attentions),
            "sees": _words(_seen(a) for a in self.attentions),
            "MLP": _words(_mlp_words(m) for m in self.mlps),
            "embeddings": _words(e.kind for e in self.embeddings),
            "head": "no" if self.head is None else "tied" if self.head.tied else "own",
            "missed": len(self.missed),
        }


def _made(site: AttentionSite) -> str:
    of = " of ".join(["q k v", *(["latents"] if site.latents else [])])
    return "fused" if site.fused else of


def _seen(site: AttentionSite) -> str:
    cap = "" if site.softcap is None else f", soft cap {site.softcap:g}"
    return site.visibility.kind + (f" {site.window} back" if site.window is not None else "") + cap


def _mlp_words(site: MlpSite) -> str:
    return site.activation + ("" if site.gate is None else ", fused gate" if site.fused else ", gate")


def _words(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words))


def recover(program: Program) -> Structure:
    """Find every part of the transformer in a program, or say why it was not found."""
    found = Structure()
    found.linears, missed = find_linears(program)
    found.norms, unclear = find_norms(program)
    found.missed += missed + unclear
    found.experts = find_experts(program)
    by_output = {s.output: s for s in found.linears}
    _find_attention(program, found, by_output)
    _find_mlps(found, by_output)
    norms = Norms.of(found.norms)
    order = {site.output: i for i, site in enumerate(found.linears)}
    sites: list[AttentionSite | MlpSite] = [*found.attentions, *found.mlps]
    sites.sort(key=lambda s: order[s.output])
    branches, missed = find_branches(sites, norms, program)
    found.missed += missed
    for group in link(branches, norms):
        layers = build_layers(group, norms)
        bound(layers, program)
        whole = layers[0].complete  # else the way back from it may lead through parts that are no embeddings
        through = by_output if whole else {}
        embeddings, norm = find_embeddings(program, layers[0].input, norms.by_output, through)
        norm = norm if whole else None
        found.towers.append(Tower(embeddings, layers, layers[-1].output, norm))
    _find_final_norms(found, norms)
    _find_head(program, found)
    mark_routers(found.linears, found.experts)
    _account(found)
    return found


def _find_attention(program: Program, found: Structure, by_output: dict[fx.Node, LinearSite]) -> None:
    readers: dict[fx.Node, list[LinearSite]] = {}
    for linear in found.linears:
        readers.setdefault(linear.x, []).append(linear)
    parts = structure_attention.Parts(program, by_output, readers, {n.output: n for n in found.norms})
    for core in structure_attention.cores(program):
        if isinstance(core, tuple):
            node, reason = core
            found.missed.append(Miss(module_fqn(node) or node.name, reason))
            continue
        try:
            site = structure_attention.find_attention(core, parts)
        except Unknown as reason:
            found.missed.append(Miss(module_fqn(core.node) or core.node.name, str(reason)))
            continue
        found.attentions.append(site)
        operands = (("q", site.q), ("k", site.k), ("v", site.v))
        for role, operand in operands:
            shares = sum(other.linear is operand.linear for _, other in operands)
            operand.linear.role = {1: role, 2: "kv", 3: "qkv"}[shares]
        for name, latent in (("q_latent", site.q_latent), ("kv_latent", site.kv_latent)):
            if latent is not None:
                latent.down.role = latent.down.role or name
        site.o.role = "o"


def _find_mlps(found: Structure, by_output: dict[fx.Node, LinearSite]) -> None:
    for down in found.linears:
        if down.role:
            continue
        try:
            site = structure_mlp.find_mlp(down, by_output)
        except Unknown as reason:
            found.missed.append(Miss(down.fqn, str(reason)))
            continue
        if site is not None:
            found.mlps.append(site)
            site.down.role = "down"
            site.up.linear.role = "gate_up" if site.fused else "up"
            if site.gate is not None and not site.fused:
                site.gate.linear.role = "gate"


def _find_final_norms(found: Structure, norms: Norms) -> None:
    inside = {n for layer in found.layers for n in layer.norms}
    for tower in found.towers:
        after = [n for n in norms.by_input.get(behind_views(tower.hidden), []) if n not in inside]
        if len(after) == 1 and tower.layers[-1].complete:
            tower.final_norm, tower.hidden = after[0], after[0].output


def _find_head(program: Program, found: Structure) -> None:
    """The head gives one number for each row of the token embedding.

    Where a rewrite cut the residual stream (pruned tokens are gathered and put back), the embedding is on
    another tower than the head, or on none; then the program's largest table counts, and the last linear. Where Dynamo
    cut the model, the table may lie in another graph, and then it is the model's largest.
    """
    for tower in found.towers:
        tokens = tower.token_embedding
        for site in found.linears:
            if (
                tokens is not None
                and not site.role
                and site.out_features == value(tokens.node.args[0]).shape[0]
            ):
                found.head, site.role = site, "head"
    if found.head is None:
        tables = [value(n.args[0]).shape[0] for n in program.nodes(aten.embedding.default)]
        if not tables and program.part is not None and program.part.vocabulary:
            tables = [program.part.vocabulary]
        last = next((s for s in reversed(found.linears) if not s.role), None)
        if (
            last is not None
            and tables
            and last.out_features == max(tables)
            and not last.output.users.keys() & {s.x for s in found.linears}
        ):
            found.head, last.role = last, "head"


def _account(found: Structure) -> None:
    """Every layer that lacks a part, and every linear without a role, gets a Miss."""
    for layer in found.layers:
        if not layer.complete:
            lacks, known = ("attention", layer.mlp) if layer.attention is None else ("MLP", layer.attention)
            at = known.fqn if known is not None else "nothing"
            found.missed.append(Miss(layer.fqn or at, f"No {lacks} was recovered in this layer, only {at}."))
    said = {m.site for m in found.missed}
    for site in found.linears:
        if not site.role and site.fqn not in said:
            readers = ", ".join(map(described, site.output.users)) or "nothing"
            place = f"it reads {described(site.x)} and feeds {readers}"
            found.missed.append(Miss(site.fqn, f"It is in no attention, no MLP and not the head: {place}."))
