"""RSQ: rotate, scale, then quantize (arXiv 2503.01820), as a rewrite.

    matched:  a linear whose low-bit codes are in the file that `thresher.quantize(...).save` wrote
    becomes:  one `thresher::wna16_linear` node (`thresher::nvfp4_linear` for the NVFP4 grid) on the file's codes; a
              product by a mixture's experts likewise, see experts.py

With the first of them the whole program is rotated, exactly: norms lose their weights, embeddings and every
linear take the rotations that the codes were made for, a `thresher::hadamard` node stands before each down
projection, and a tied head gets its own copy. A linear that stays in full precision is rotated all the same.

Without a file every linear is a Miss: codes need calibration data, which `thresher.quantize` takes. What is
not in the file (embeddings, head, biases) is computed from the model's own weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from thresher.errors import ArgumentError
from thresher.graph.edit import replace
from thresher.graph.program import Program

from ..base import Context, Effect, Match, Miss, Pass, register_pass
from ..savings import savings
from ..structure.experts import by_weight
from ..structure.linears import find_linears
from ..structure.recover import LinearSite, Structure
from ..structure.sites import by_module, read_instead
from . import rewrite as rsq_rewrite
from .config import RSQConfig, decode_text, encode_text
from .edits import Edit, RotationPlan
from .experts import AS_IT_IS, NO_CODES, CodedExperts, coded_weights, match_experts, put_experts, sizes_of
from .plan import make_plan
from .shared import calls

ops = torch.ops.thresher
CUTS = {"transprune", "zipvl", "deft"}  # passes behind which layers are no longer whole
HEADER = "recipe"  # the site name under which a file keeps its options
NEEDS_DATA = "It needs calibration: run thresher.quantize(model, data, RSQ(...)).save(path) and name that file in `stats`."


HIDDEN = (
    "rsq: the cache must hold unrotated values, so that each attention now stands between two rotations, behind which zipvl"
    " and transprune do not recognise the layers. Quantize with rotate_heads=False to use them together."
)


@dataclass
class _Rotation:
    """A plan that is carried out with the first site that needs it."""

    plan: RotationPlan
    done: bool = False


@dataclass(frozen=True)
class CodedSite:
    """A linear's places in the graph, its tensors (see `codes.to_tensors`), and its weight's bytes before and after."""

    sites: tuple[LinearSite, ...]
    tensors: Mapping[str, torch.Tensor]
    sizes: tuple[int, int]
    rotation: _Rotation | None = field(repr=False)


@register_pass
class RSQ(Pass[RSQConfig]):
    """Puts the low-bit codes of a file into the graph, rotated as they were made. See the module's docstring."""

    name = "rsq"
    effect = Effect(exact=False, budget=1.0)
    rewrites_weights = True

    def budget(self, context: Context[RSQConfig]) -> float:
        return context.config.budget

    def linear_kernels(self, config: RSQConfig) -> Sequence[str]:
        return ("nvfp4_linear.exact",) if config.grid == "nvfp4" else (f"wna16_linear.{config.bits}",)

    def prepare(self, program: Program, context: Context[RSQConfig]) -> dict[str, str] | None:
        """Rotate before passes that cut layers apart: behind them nothing says any more what reads the stream.

        Not where that would rotate the neurons DEFT is to skip: it comes first, and codes for such a rotation miss.
        """
        stats, others = context.stats.get(self.name, {}), {c.name for c in context.recipe.passes}
        if HEADER not in stats or not CUTS & others:
            return None
        if "deft" in others and quantized_with(stats).rotate_down:
            return None
        plan = make_plan(program, context.structure(), quantized_with(stats))
        rsq_rewrite.rotate(program, plan)
        context.notes.append(
            "rsq: rotated the whole program before the other passes; its codes are put in behind them."
        )
        if {"zipvl", "transprune"} & others and any(e.heads_out and e.cached for e in plan.edits.values()):
            context.notes.append(HIDDEN)
        return {e.site.fqn: signature(e) for e in plan.edits.values() if e.site in plan.quantise}

    def match(self, program: Program, context: Context[RSQConfig]) -> Sequence[Match | Miss]:
        structure = context.structure()
        stats = context.stats.get(self.name, {})
        if HEADER not in stats:
            named = dict.fromkeys([s.fqn for s in structure.linears] + [s.fqn for s in structure.experts])
            return [*(Miss(fqn, NEEDS_DATA) for fqn in named), *find_linears(program)[1]]
        config = quantized_with(stats)
        differing = context.config.contradictions(config)
        if differing:
            raise ArgumentError("rsq options", "; ".join(differing), "the options that the file was quantized with",
                                "Leave them out, or quantize again.")  # fmt: skip
        if context.prepared is not None:
            return _prepared(program, structure, stats, context)
        plan = make_plan(program, structure, config)
        rotation = _Rotation(plan)
        found: list[Match | Miss] = list(dict.fromkeys(plan.missed))
        for site in plan.quantise:
            tensors = stats.get(site.fqn)
            reason = mismatch(plan.edits[site], tensors)
            if reason is not None:
                found.append(Miss(site.fqn, reason))
                continue
            assert tensors is not None
            held = program.weights[site.weight]
            found.append(
                Match(
                    site.fqn,
                    CodedSite(calls(plan, site), tensors, sizes_of(held, tensors), rotation),
                    claims=(held.fqn,),
                )
            )
        return found + match_experts(program, [(site,) for site in plan.experts], stats)

    def about(self, done: Sequence[Match], context: Context[RSQConfig]) -> Sequence[str]:
        return savings([m.data.sizes for m in done])

    def rewrite(self, program: Program, match: Match, context: Context[RSQConfig]) -> None:
        if isinstance(match.data, CodedExperts):
            put_experts(program, match.data)
            return
        data: CodedSite = match.data
        if data.rotation is not None and not data.rotation.done:
            rsq_rewrite.rotate(program, data.rotation.plan)
            data.rotation.done = True
            context.notes.extend(data.rotation.plan.notes)
        held = program.weights[data.sites[0].weight]
        names = {
            n: program.add_weight(w) for n, w in coded_weights(data.sites[0].fqn, data.tensors, held).items()
        }
        for site in data.sites:
            self._put(program, site, data, names, context)

    def _put(
        self,
        program: Program,
        site: LinearSite,
        data: CodedSite,
        names: Mapping[str, str],
        context: Context[RSQConfig],
    ) -> None:
        """The product with codes in the place of one with a weight. names: of the codes' parts in the program."""
        at = site.output
        nodes = {part: program.read_weight(name, at) for part, name in names.items()}
        bias = None if site.bias is None else program.read_weight(site.bias, at)
        args: tuple[Any, ...]
        if "block_scales" in nodes:
            target = ops.nvfp4_linear.default
            scales = (nodes["codes"], nodes["block_scales"], nodes["global_scale"])
            args = (site.x, *scales, None, bias, "exact")
        else:
            target = ops.wna16_linear.default
            groups = data.tensors["scales"].shape[1]
            group = -1 if groups == 1 else site.in_features // groups
            bits = int(data.tensors["bits"])
            args = (site.x, nodes["codes"], nodes["scales"], nodes.get("zeros"), bias, bits, group)
        node = program.insert(at, target, *args)
        replace(at, node)
        sites = (
            [e.site for e in data.rotation.plan.edits.values()]
            if data.rotation
            else context.structure().linears
        )
        read_instead(sites, at, node)


def _prepared(
    program: Program,
    structure: Structure,
    stats: Mapping[str, Mapping[str, torch.Tensor]],
    context: Context[RSQConfig],
) -> list[Match | Miss]:
    """The linears of a program that was rotated before other passes cut it, by the names they had."""
    found: list[Match | Miss] = []
    for sites in by_module(structure.linears):
        site = sites[0]
        name = site.fqn.removesuffix(rsq_rewrite.SUFFIX)
        made, tensors = context.prepared.get(name), stats.get(name)
        held = program.weights[site.weight]
        reason = mismatch_of(made or "not rotated", site, tensors)
        if reason is None and made is None:
            reason = (
                "It is no linear that was in the program when it was rotated, so there are no codes for it."
            )
        if reason is None:
            assert tensors is not None
            found.append(
                Match(name, CodedSite(sites, tensors, sizes_of(held, tensors), None), claims=held.origins)
            )
        else:
            found.append(Miss(name, reason))
    return found + match_experts(program, by_weight(structure.experts), stats)


def signature(edit: Edit) -> str:
    """What a linear's codes were made for, in words: `reads the rotated stream, ...`."""
    parts = []
    if edit.norm is not None:
        parts.append("its norm fused")
    if edit.reads is not None:
        parts.append("reads a rotated latent" if edit.latent_in else "reads the rotated stream")
    if edit.heads_in is not None:
        parts.append("reads rotated heads")
    if edit.online is not None:
        parts.append("reads an online rotation")
    if edit.writes is not None:
        parts.append("writes the rotated stream")
    if edit.heads_out is not None:
        parts.append("makes a rotated latent" if edit.latent_out else "makes rotated heads")
    return ", ".join(parts) or AS_IT_IS


def mismatch(edit: Edit, tensors: Mapping[str, torch.Tensor] | None) -> str | None:
    """Why a file's codes do not serve a linear of this graph, or None."""
    return mismatch_of(signature(edit), edit.site, tensors)


def mismatch_of(here: str, site: LinearSite, tensors: Mapping[str, torch.Tensor] | None) -> str | None:
    """The same, for a linear that would be `here` in words."""
    if tensors is None:
        return NO_CODES
    made_for = decode_text(tensors["made_for"])
    if made_for != here:
        return (
            f"Its codes were made for a linear that is: {made_for}. In this graph it would be: {here}; see the misses "
            "about rotation."
        )
    rows = tensors["codes"].shape[0]
    if rows != site.out_features:
        return f"Its codes have {rows} rows and the linear {site.out_features}."
    return None


def quantized_with(stats: Mapping[str, Mapping[str, torch.Tensor]]) -> RSQConfig:
    """The options that a file's codes were made with."""
    return RSQConfig.from_json(decode_text(stats[HEADER]["config"]))


def to_statistics(
    linears: Mapping[str, Mapping[str, torch.Tensor]], plan: RotationPlan, config: RSQConfig
) -> dict[str, dict[str, torch.Tensor]]:
    """What a file of statistics keeps under this pass's name."""
    made_for = {edit.site.fqn: signature(edit) for edit in plan.edits.values()}
    found = {
        site: {**t, "made_for": encode_text(made_for.get(site, AS_IT_IS))} for site, t in linears.items()
    }
    found[HEADER] = {"config": encode_text(config.to_json())}
    return found
