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
from torch import fx

from thresher.graph.call_plan import CallPlan, Choice, Shortened
from thresher.graph.call_rules import Rule
from thresher.graph.nodes import value
from thresher.graph.packed_layout import Counted
from thresher.graph.program import Program
from thresher.graph.sizes import allow_decided_by_data, example_of
from thresher.undone import FEEDING

from ..base import Context, Declined, Effect, Match, Miss, Pass, register_pass
from ..calibrate import Tap
from ..causal_mask import prepare_causal
from ..structure.recover import LayerSite
from ..tokens.axes import Stop
from ..tokens.segments import caller, caller_types
from ..tokens.towers import largest_tower, layer_flops, no_layers
from ..tokens.types import (
    NotPrunable,
    Types,
    counts_program,
    embeddings_fed,
    find_types,
    publish_image,
    types_facts,
)
from .budget import CallLengths, SequenceBudget, budget, budget_facts, protected_tokens, zip_flops
from .collector import Pair
from .config import ZipVLConfig
from .replay import HEADS, rewrite_layers
from .stretches import Stretch, find_stretches, why_not

EXPECTED = 0.5  # share of tokens that attend in a layer, where counts are exact and nothing was calibrated


@dataclass
class ZipPlan:
    """What `match` worked out for the whole program. protected: most protected tokens of a row.

    counted: where token types come from in the caller's inputs of a packed program.
    """

    stretches: list[Stretch]
    types: Types
    layers: list[tuple[LayerSite, float]]
    protected: int
    counted: Types


Ours = Context[ZipVLConfig]


@register_pass
class ZipVL(Pass[ZipVLConfig]):
    """Lets only important tokens attend and be attended to. See the module's docstring."""

    name = "zipvl"
    moves_tokens = True
    effect = Effect(exact=False, budget=float("inf"))

    def budget(self, context: Ours) -> float:
        return context.config.budget

    def prepare(self, program: Program, context: Ours) -> int | None:
        return prepare_causal(program, context)

    def taps(self, program: Program, context: Ours) -> Sequence[Tap]:
        tower = largest_tower(context.structure())
        found = []
        for layer in tower.layers if tower else ():
            site = layer.attention
            if site is None or why_not(layer) is not None:
                continue
            pair = Pair(context.config, site.operator_scale)
            found.append(Tap(f"{site.fqn}.queries", site.q.result, partial(pair.side, "q")))
            found.append(Tap(site.fqn, site.k.result, partial(pair.side, "k")))
        return found

    def match(self, program: Program, context: Ours) -> Sequence[Match | Miss]:
        config = context.config
        fed = embeddings_fed(program)
        if fed and not context.structure().layers:
            return [Match(FEEDING, fed)]
        try:
            stretches = find_stretches(program, context.structure())
            if not stretches:
                return no_layers(context.structure())
            types, counted = self._types(program, stretches, context)
            lengths, protected = self._rows(program, stretches, (types, counted), context)
        except (NotPrunable, Stop) as reason:
            return [Miss("the whole program", str(reason))]
        good: list[tuple[LayerSite, float]] = []
        misses: list[Match | Miss] = []
        dense = sum(
            sum(layer_flops(layer, n)) for s in stretches for layer in s.layers for n, _ in lengths[s]
        )
        context.flops.update(before=dense, after=dense)
        number = 0
        for stretch in stretches:
            for layer in stretch.layers:
                number += 1
                early = None
                if number < config.first_layer:
                    early = f"It is layer {number}, and first_layer={config.first_layer} leaves it as it is."
                why = early or why_not(layer) or self._why_dense(layer, stretch, lengths[stretch], context)
                if why is not None:
                    misses.append(Miss(layer.attention.fqn if layer.attention else layer.fqn, why))
                else:
                    good.append((layer, self._share(layer, context)))  # type: ignore[arg-type]
        if not good:
            return misses
        plan = ZipPlan(stretches, types, good, protected, counted)
        return [*misses, Match(", ".join(layer.fqn for layer, _ in good), plan)]

    def _types(self, program: Program, stretches: list[Stretch], context: Ours) -> tuple[Types, Types]:
        """Where token types come from: in the program, and in the caller's inputs."""
        config = context.config
        sizes = [example_of(s) for s in value(stretches[0].start).shape[:2]]
        if program.packing is None:
            types = find_types(program, config, sizes, context.inputs)
            return types, types
        if config.counts == "exact":
            raise NotPrunable(
                "The program is packed, and its sequences' budgets are counted before a call starts; counts='exact'"
                " would count inside it. Leave it at 'bucketed', where each sequence still has a budget of its own."
            )
        types, counted = (
            find_types(program, config, sizes, None),
            caller_types(program, config, context.inputs),
        )
        if counted.kind not in ("ids", "none") or types.kind != counted.kind:
            raise NotPrunable(
                "The program is packed, and image tokens are found in it by image_token_id only."
            )
        if config.kv == "drop" and any(
            value(n).dim() == 4 for n in program.outputs if isinstance(n, fx.Node)
        ):
            raise NotPrunable(
                "The program is packed, and keys and values of important tokens only, as kv='drop' returns them, have"
                " no place in the padded results; kv='quantize' keeps them all at fewer bits."
            )
        return types, counted

    def _share(self, layer: LayerSite, context: Ours) -> float | None:
        """The share of tokens that attend in a layer; None without calibration."""
        if context.config.keep is not None:
            return context.config.keep
        assert layer.attention is not None
        site = context.stats.get(self.name, {}).get(layer.attention.fqn)
        if site is not None:
            return float(torch.quantile(site["shares"].double(), context.config.quantile))
        return EXPECTED if context.config.counts == "exact" else None

    def _why_dense(
        self, layer: LayerSite, stretch: Stretch, rows: list[tuple[int, int]], context: Ours
    ) -> str | None:
        """Why a layer is left dense; None, with what it saves off the account of FLOPs, where it is not."""
        config, site, axes = context.config, layer.attention, stretch.axes
        assert site is not None
        if layer.output not in axes or axes.get(site.k.result) != HEADS:
            return f"Its tokens cannot be followed: {axes.stopped.get(layer.output, 'its keys have another layout')}."
        share = self._share(layer, context)
        if share is None:
            return (
                f"It needs calibration at tau {config.tau}: run thresher.calibrate(model, batches, zipvl={{...}}) and"
                " compile with stats=, or give keep."
            )
        probes = config.recent + config.spread
        longest = max(n for n, _ in rows)
        if longest <= probes:
            return f"The prompt has {longest} tokens, and {probes} are probed."
        dense = sum(sum(layer_flops(layer, n)) for n, _ in rows)
        kept = [budget(n, share, p, config.bucket) if n > probes else n for n, p in rows]
        saved = dense - sum(zip_flops(layer, n, k, probes, config.gather) for (n, _), k in zip(rows, kept))
        if saved < config.min_saving * dense:
            return (
                f"{sum(kept)} of {sum(n for n, _ in rows)} tokens would attend, which saves {saved / dense:.1%} of the"
                f" layer's FLOPs; min_saving is {config.min_saving:.0%}."
            )
        context.flops["after"] -= saved
        return None

    def _rows(
        self, program: Program, stretches: list[Stretch], plan_types: tuple[Types, Types], context: Ours
    ) -> tuple[dict[Stretch, list[tuple[int, int]]], int]:
        """(tokens, protected ones) of the example's sequences in each stretch, and the most protected ones of a row."""
        config, (types, counted) = context.config, plan_types
        if program.packing is None:
            protected = self._protected(program, types, context)
            return {s: [(s.length, protected)] for s in stretches}, protected
        offsets = stretches[0].offsets
        count = example_of(value(offsets).shape[0]) - 1 if offsets is not None else 1
        lengths, images = [stretches[0].length // count] * count, counted
        inputs = context.inputs
        if inputs is not None:
            lengths = [int(n) for n in (inputs[program.packing.mask] != 0).sum(1)]
        else:
            images = Types("none")
        text = SequenceBudget(config, 1.0, counted.kind == "ids")
        rows = {}
        for number, stretch in enumerate(stretches):
            known = self._call_lengths(program, images, number)(lengths, inputs or ())
            rows[stretch] = [(n, text.protected(t)) for n, t in known]
        return rows, 0

    def _call_lengths(self, program: Program, counted: Types, number: int) -> CallLengths:
        behind = program.calls.behind[:number] if program.calls is not None else ()
        asked = counts_program(caller(program), counted) if counted.kind != "none" else None
        return CallLengths(counted, asked, tuple(behind))

    def _protected(self, program: Program, types: Types, context: Ours) -> int:
        config = context.config
        if config.choice is not None:
            return config.choice[0]
        if context.inputs is None:
            return config.recent + config.sinks
        asked = counts_program(program, types)
        values = asked.run(*context.inputs) if asked is not None else []
        return protected_tokens(types, config, values, context.inputs)

    def rewrite(self, program: Program, match: Match, context: Ours) -> None:
        if isinstance(match.data, dict):
            program.calls = publish_image(program, match.data)
            return
        plan: ZipPlan = match.data
        config = context.config
        old = program.calls or CallPlan()
        extra = [n for n in ("token_types",) if plan.types.kind == "extra" and n not in old.extra_inputs]
        choices = dict(old.choices)
        sizes: dict[Any, Counted] = {}
        if config.counts == "exact":
            allow_decided_by_data(program.fake_mode())
        elif program.packing is None:
            asked = counts_program(program, plan.types)
            facts = {"types": types_facts(plan.types), "config": budget_facts(config)}
            choices[self.name] = Choice((plan.protected,), asked, Rule("zipvl.protected", facts))
        else:
            sizes = self._counted(program, plan, config)
        try:
            done = rewrite_layers(program, plan, config, extra, sizes)
        except Stop as reason:
            raise Declined(f"Its tokens cannot be followed: {reason}.") from reason
        program.calls = CallPlan(
            choices,
            [*old.extra_inputs, *extra],
            [*old.extra_outputs, *done.names],
            {**old.shortened, **{i: Shortened(2, kept, False) for i, kept in done.shortened.items()}},
            {**old.scored, **done.scored},
            old.published,
            old.behind,
        )
        shares = ", ".join(f"{share:.2f}" for _, share in plan.layers)
        if config.counts == "exact":
            context.notes.append(
                f"{plan.types.describe()}; as many tokens attend as hold {config.tau} of the attention, counted in each"
                f" layer of each call; expected by layer: {shares}."
            )
            return
        context.notes.append(f"{plan.types.describe()}; share of tokens that attend, by layer: {shares}.")

    def _counted(self, program: Program, plan: ZipPlan, config: ZipVLConfig) -> dict[Any, Counted]:
        """How many tokens attend in a call, all packed sequences together, for each stretch and share."""
        found = {}
        where = {layer: (i, s) for i, s in enumerate(plan.stretches) for layer in s.layers}
        for layer, share in plan.layers:
            number, stretch = where[layer]
            lengths = self._call_lengths(program, plan.counted, number)
            facts = {
                "types": types_facts(plan.counted),
                "config": budget_facts(config),
                "share": share,
                "behind": [{"name": b.name, "facts": b.facts} for b in lengths.behind],  # type: ignore[attr-defined]
            }
            found[(stretch, share)] = Counted(Rule("zipvl.places", facts, lengths.asked))
        return found
