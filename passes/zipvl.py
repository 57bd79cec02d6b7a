"""ZipVL: in each attention, let only the tokens that matter there attend and be attended to.

    matched:  causal self-attention over a whole prompt
    becomes:  probe rows -> importance of every key -> attention among the important ones -> zeros elsewhere

The residual stream, norms and MLP keep all tokens, and each layer chooses anew, so nothing is lost for
good (arXiv 2410.08584). Probes are the most recent rows and as many spread over the rest. With
`gather="projections"`, ours, only probes and important tokens go through the query, value and output
projections as well.

How many are important is fixed when a program is built: a share given by `keep`, or calibrated per
layer so that they hold `tau` of the probes' attention. The share really held is reported for each call.
Text is always important unless `mode="paper"`, where the token that answers may fall out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from thresher.call_plan import CallPlan, Choice, Shortened
from thresher.errors import ArgumentError
from thresher.program import Program, value
from thresher.recipe import PassConfig

from .base import Context, Effect, Match, Miss, Pass, register_pass
from .calibrate import Tap
from .causal_mask import candidates, make_causal
from .structure import LayerSite, Tower
from .token_axes import BATCH, SEQUENCE, Stop, TokenAxes, hint, propagate
from .tokens import Decline, Types, counts_program, find_types, image_counts, largest_tower, layer_flops
from .zipvl_calibrate import Pair
from .zipvl_replay import budget, rewrite_layers

MODES = ("protected", "paper")
GATHER = ("projections", "attention")
KV = ("keep", "quantize", "drop")


@dataclass(frozen=True)
class ZipVLConfig(PassConfig):
    """Options of ZipVL.

    keep: share of tokens, beside protected ones, that attend in every layer; None takes each layer's share
        from calibration at `tau`.
    tau: share of the probes' attention that important tokens must hold. quantile: of the shares calibrated.
    mode: "protected", or "paper": nothing is protected. sinks: first tokens protected where all is text.
    recent, spread, seed: probe rows; the recent ones are protected where all is text.
    gather: "projections", or "attention" to choose after the projections, as published.
    kv: "keep" returns all keys and values; "quantize" returns importance with them, for a
        `MixedPrecisionCache`; "drop" returns important ones only (the paper's second version).
    first_layer: layers before it are left alone; they count from one.
    bucket: important tokens are a multiple of it. min_saving: least share of a layer's FLOPs to save.
    image_token_id, image_span: see token pruning. budget: largest relative change of results.
    choice: protected tokens to reckon with; None to count them.
    """

    name = "zipvl"
    keep: float | None = None
    tau: float = 0.975
    quantile: float = 0.95
    mode: str = "protected"
    sinks: int = 4
    recent: int = 64
    spread: int = 64
    seed: int = 0
    gather: str = "projections"
    kv: str = "keep"
    first_layer: int = 1
    bucket: int = 64
    min_saving: float = 0.03
    image_token_id: int | None = None
    image_span: tuple[int, int] | None = None
    budget: float = float("inf")
    choice: tuple[int, ...] | None = None

    def validate(self) -> None:
        self.one_of(mode=MODES, gather=GATHER, kv=KV)
        self.at_least(recent=1, spread=0, bucket=1, first_layer=1, sinks=0)
        shares = {
            "tau": self.tau,
            "quantile": self.quantile,
            **({} if self.keep is None else {"keep": self.keep}),
        }
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ArgumentError(name, share, "a share above 0, at most 1", "ZipVL uses tau .96 to .975.")


@dataclass
class Plan:
    """What `match` worked out for the whole program. protected: most protected tokens of a row."""

    tower: Tower
    types: Types
    axes: TokenAxes
    layers: list[tuple[LayerSite, float]]
    protected: int


@register_pass
class ZipVL(Pass):
    name, order, config_type = "zipvl", 22, ZipVLConfig
    effect = Effect(exact=False, budget=float("inf"))

    def budget(self, context: Context) -> float:
        return context.config.budget

    def taps(self, program: Program, context: Context) -> Sequence[Tap]:
        for node, _, reason in candidates(program):
            if reason is None:
                make_causal(node)
        tower = largest_tower(context.structure()) if context.structure else None
        found = []
        for layer in tower.layers if tower else ():
            site = layer.attention
            if site is None or _why_not(layer) is not None:
                continue
            pair = Pair(context.config, site.scale)
            found.append(Tap(f"{site.fqn}.queries", site.q.result, partial(pair.side, "q")))
            found.append(Tap(site.fqn, site.k.result, partial(pair.side, "k")))
        return found

    def match(self, program: Program, context: Context) -> Sequence[Match | Miss]:
        for node, _, reason in candidates(program):
            if reason is None:
                make_causal(node)
        program.clean()
        tower = largest_tower(context.structure()) if context.structure else None
        if tower is None:
            return []
        config = context.config
        try:
            start = tower.layers[0].input
            if value(start).dim() != 3:
                raise Decline(
                    f"The hidden state has {value(start).dim()} dimensions, not [batch, tokens, width]."
                )
            types = find_types(program, config, [hint(s) for s in value(start).shape[:2]], context.inputs)
            axes = propagate(program, {start: (BATCH, SEQUENCE, None)})
            protected = self._protected(program, types, context)
        except (Decline, Stop) as reason:
            return [Miss(layer.fqn, str(reason)) for layer in tower.layers]
        length = hint(value(start).shape[1])
        good: list[tuple[LayerSite, float | None]] = []
        misses: list[Match | Miss] = []
        for layer in tower.layers[config.first_layer - 1 :]:
            why = _why_not(layer) or self._why_dense(layer, axes, length, protected, context)
            if why is not None:
                misses.append(Miss(layer.attention.fqn if layer.attention else layer.fqn, why))
            else:
                good.append((layer, self._share(layer, context)))
        if not good:
            return misses
        context.predicted["flops_dense"] = sum(sum(layer_flops(layer, length)) for layer in tower.layers)
        plan = Plan(tower, types, axes, good, protected)  # type: ignore[arg-type]
        return [*misses, Match(", ".join(layer.fqn for layer, _ in good), plan)]

    def _share(self, layer: LayerSite, context: Context) -> float | None:
        """The share of tokens that attend in a layer; None without calibration."""
        if context.config.keep is not None:
            return context.config.keep
        assert layer.attention is not None
        found = context.stats.get(self.name, {}) if hasattr(context.stats, "get") else {}
        site = found.get(layer.attention.fqn)
        return (
            None if site is None else float(torch.quantile(site["shares"].double(), context.config.quantile))
        )

    def _why_dense(
        self, layer: LayerSite, axes: TokenAxes, length: int, protected: int, context: Context
    ) -> str | None:
        config, site = context.config, layer.attention
        assert site is not None
        if layer.output not in axes or axes.get(site.k.result) != (BATCH, None, SEQUENCE, None):
            return f"Its tokens cannot be followed: {axes.stopped.get(layer.output, 'its keys have another layout')}."
        share = self._share(layer, context)
        if share is None:
            return (
                f"It needs calibration at tau {config.tau}: run thresher.calibrate(model, batches, zipvl={{...}}) and"
                " compile with stats=, or give keep."
            )
        kept = budget(length, share, protected, config.bucket)
        probes = config.recent + config.spread
        if length <= probes:
            return f"The prompt has {length} tokens, and {probes} are probed."
        dense = sum(layer_flops(layer, length))
        spared = dense - zip_flops(layer, length, kept, probes, config.gather)
        if spared < config.min_saving * dense:
            return (
                f"{kept} of {length} tokens would attend, which saves {spared / dense:.1%} of the layer's FLOPs;"
                f" min_saving is {config.min_saving:.0%}."
            )
        context.predicted["flops_saved"] = context.predicted.get("flops_saved", 0.0) + spared
        return None

    def _protected(self, program: Program, types: Types, context: Context) -> int:
        config = context.config
        if config.choice is not None:
            return config.choice[0]
        if context.inputs is None:
            return config.recent + config.sinks
        asked = counts_program(program, types)
        values = asked.run(*context.inputs) if asked is not None else []
        return protected_tokens(types, config, values, context.inputs)

    def rewrite(self, program: Program, match: Match, context: Context) -> None:
        plan: Plan = match.data
        config = context.config
        asked = counts_program(program, plan.types)
        extra = ["token_types"] if plan.types.kind == "extra" else []

        def decide(values: Sequence[Any], inputs: Sequence[Any]) -> tuple[int, ...]:
            return (protected_tokens(plan.types, config, values, inputs),)

        done = rewrite_layers(program, plan, config, extra)
        old = program.calls or CallPlan()
        program.calls = CallPlan(
            {**old.choices, self.name: Choice((plan.protected,), asked, decide)},
            list(dict.fromkeys([*old.extra_inputs, *extra])),
            [*old.extra_outputs, *done.names],
            {**old.shortened, **{i: Shortened(2, kept, False) for i, kept in done.shortened.items()}},
            {**old.scored, **done.scored},
            old.published,
        )
        shares = ", ".join(f"{share:.2f}" for _, share in plan.layers)
        context.notes.append(f"{plan.types.describe()}; share of tokens that attend, by layer: {shares}.")


def _why_not(layer: LayerSite) -> str | None:
    """Why a layer's attention is not one this pass understands, as a sentence."""
    site = layer.attention
    if site is None:
        return "No attention was recovered in this layer."
    if site.spelling != "sdpa":
        return f"Its attention is spelled {site.spelling}; only scaled_dot_product_attention is rewritten."
    if site.past is not None or site.cross:
        return "Its keys are not the queries' own tokens, so this is no prompt."
    if not site.is_causal:
        return f"Its attention is {site.visibility.kind}, not causal."
    if site.window is not None:
        return f"It sees a window of {site.window + 1} tokens only, which has little to save."
    if site.softcap is not None:
        return "It caps its logits, which the attention operators here do not."
    return None


def zip_flops(layer: LayerSite, length: int, kept: int, probes: int, gather: str) -> float:
    """FLOPs of a layer rewritten so, probes included; a multiply-add counts as two."""
    site = layer.attention
    assert site is not None
    linears, attention = layer_flops(layer, length, kept)
    if gather == "projections" and not site.fused:
        q, v, o = (2 * s.in_features * s.out_features for s in (site.q.linear, site.v.linear, site.o))
        linears -= (q + o + v) * (length - kept) - q * probes
    return linears + attention + 2 * probes * length * site.heads * site.head_dim


def protected_tokens(types: Types, config: ZipVLConfig, values: Sequence[Any], inputs: Sequence[Any]) -> int:
    """The most protected tokens of any row, rounded up to whole buckets."""
    if config.mode == "paper":
        return 0
    if types.kind == "none":
        return config.recent + config.sinks
    images, pads = image_counts(types, values, inputs)
    if images is None:
        return config.recent + config.sinks
    length = types.length(values, inputs)
    most = max(length - image - pad for image, pad in zip(images, pads))
    return -(-most // config.bucket) * config.bucket
