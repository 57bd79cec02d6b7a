"""Token pruning: leave image tokens out from a layer on, so that everything behind it is shorter.

    matched:  a boundary between two layers of the language model, and where its image tokens are
    becomes:  score -> topk_sorted -> gather of hidden state, rotary tables and masks; the layers behind run
              on the kept tokens; results with a value for each token get their places back

Text is never left out, the order of tokens and their positions stay. The number of tokens left out is
fixed when a program is built, so it has one shape and waits for no device; how many may go is counted
from each call's token types beforehand, and calls with another count (in steps of `bucket`) get a
program of their own. TransPrune (arXiv 2507.20630) is one policy of several; `prune_scores` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

from torch import fx

from thresher import given_tokens
from thresher.errors import ArgumentError
from thresher.graph.call_plan import CallPlan, Shortened
from thresher.graph.call_rules import Rule
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of
from thresher.undone import FEEDING

from ..base import Context, Declined, Effect, Match, Miss, Pass, register_pass
from ..causal_mask import prepare_causal
from ..structure.recover import Tower
from ..tokens.axes import BATCH, SEQUENCE, Stop, TokenAxes, propagate
from ..tokens.replay import check
from ..tokens.segments import caller, caller_types, offsets_node
from ..tokens.towers import largest_tower, no_layers
from ..tokens.types import (
    NotPrunable,
    Types,
    counts_program,
    embeddings_fed,
    find_types,
    publish_image,
    whole,
)
from .config import TransPruneConfig
from .drops import Counting, NothingToSpare, choice_of, drops_for, too_little
from .positions import position_tables
from .replay import prune
from .scores import past_windows

# The published schedule: behind layers 7, 9 and 12 of 32, as shares of the depth, and what stays.
HIGH = ((7 / 32, 0.875), (9 / 32, 0.625), (12 / 32, 0.125))


@dataclass
class Pruning:
    """What `match` worked out. stages: those inside the model. drops: tokens gone behind each.

    offsets: of a packed program's sequences. counted: where token types come from in the caller's inputs.
    tables: values that stand for positions, where these are renumbered.
    """

    tower: Tower
    types: Types
    axes: TokenAxes
    stages: tuple[tuple[int, float], ...]
    drops: tuple[int, ...]
    offsets: fx.Node | None = None
    counted: Any = None
    tables: frozenset[fx.Node] = frozenset()


@register_pass
class TransPrune(Pass[TransPruneConfig]):
    """Leaves image tokens out from a layer on. See the module's docstring."""

    name = "transprune"
    moves_tokens = True
    effect = Effect(exact=False, budget=float("inf"))

    def budget(self, context: Context[TransPruneConfig]) -> float:
        return context.config.budget

    def prepare(self, program: Program, context: Context[TransPruneConfig]) -> int | None:
        return prepare_causal(program, context)

    def match(self, program: Program, context: Context[TransPruneConfig]) -> Sequence[Match | Miss]:
        if context.config.choice is not None and not any(context.config.choice) and not context.config.always:
            return whole("", "No token may be left out: for calls like this one, zero was chosen.")
        fed = embeddings_fed(program)
        if fed and not context.structure().layers:
            return [Match(FEEDING, fed)]
        tower = largest_tower(context.structure())
        if tower is None:
            return no_layers(context.structure())
        stages, misses = _stages(context.config, tower)
        if not stages:
            return misses
        try:
            return [*misses, self._match(program, context, tower, stages)]
        except NothingToSpare as reason:
            later = [Match("later calls", reason.later, of_calls=True)] if reason.later else []
            return [*misses, Miss(_site(tower, stages), str(reason)), *later]
        except (NotPrunable, Stop) as reason:
            return [*misses, Miss(_site(tower, stages), _sentence(reason))]

    def _match(
        self, program: Program, context: Context[TransPruneConfig], tower: Tower, stages: Any
    ) -> Match:
        config = context.config
        packed = program.packing is not None
        sizes = [example_of(s) for s in value(tower.layers[0].input).shape[:2]]
        types = find_types(program, config, sizes, None if packed else context.inputs, may_come=True)
        start = tower.layers[stages[0][0]].input
        if value(start).dim() != 3:
            raise NotPrunable(
                f"The hidden state has {value(start).dim()} dimensions, not [batch, tokens, width]."
            )
        offsets, counted = None, types
        if packed:
            offsets, counted = _packed(program, config, types)
        if config.accumulate_from is not None and config.accumulate_from > stages[0][0]:
            raise NotPrunable(
                f"accumulate_from={config.accumulate_from} is behind the first stage, which is after layer {stages[0][0]}."
            )
        if config.user_turn:
            _check_question(packed, sizes)
        axes = propagate(program, {start: (BATCH, SEQUENCE, None)})
        if packed and any(n in axes and value(n).dim() != 3 for n in program.outputs):
            raise NotPrunable(
                "The program is packed and returns keys and values, which cannot be unpacked once pruned."
            )
        for layer in tower.layers[stages[0][0] :]:
            if layer.output not in axes:
                why = axes.stopped.get(layer.output, "it does not depend on the layers before")
                raise NotPrunable(f"{layer.fqn} cannot be run on fewer tokens: {why}.")
            if layer.attention is None:
                raise NotPrunable(f"{layer.fqn} has no attention that was recovered.")
        check(program, axes)
        tables: frozenset[fx.Node] = frozenset()
        if config.position == "renumbered":
            tables = position_tables(program, tower.layers[stages[0][0] :], axes)
        drops = config.choice
        if drops is None:
            drops = _drops_now(program, counted, config, stages, context, example_of(value(start).shape[1]))
        crossed = [a.fqn for a in context.structure().attentions if a.cross]
        if crossed and types.kind in ("none", "extra"):
            raise NotPrunable(
                f"The image is read through cross-attention ({crossed[0]}), none of the tokens is an image's, and this pass "
                "leaves out no keys of another sequence. Leave transprune out for this model."
            )
        counted_later = types.kind != "none" and not packed and config.choice is None and sizes[1] != 1
        later = Counting(counted, stages, drops) if counted_later else None
        if types.kind == "none" or (not any(drops) and not config.always):
            raise NothingToSpare(
                f"No token may be left out: {types.describe()}, and at least {config.min_image_tokens} are needed in"
                f" every row, of which a multiple of {config.bucket} must go.",
                later,
            )
        little = too_little(context, tower, stages, drops, example_of(value(start).shape[1]))
        if little is not None:
            raise NothingToSpare(little, later)
        return Match(
            _site(tower, stages), Pruning(tower, types, axes, stages, drops, offsets, counted, tables)
        )

    def about(self, done: Sequence[Match], context: Context[TransPruneConfig]) -> Sequence[str]:
        said: list[str] = []
        for found in (m.data for m in done if isinstance(m.data, Pruning)):
            past = (past_windows(found.tower, context.config.policy, after) for after, _ in found.stages)
            said += [note for note in past if note]
            said.append(f"{found.types.describe()}; tokens left out behind layer " + ", ".join(
                f"{after}: {drop}" for (after, _), drop in zip(found.stages, found.drops)) + ".")  # fmt: skip
        return said

    def rewrite(self, program: Program, match: Match, context: Context[TransPruneConfig]) -> None:
        if isinstance(match.data, dict):
            program.calls = publish_image(program, match.data)
            return
        config = context.config
        if isinstance(match.data, Counting):
            plan = program.calls or CallPlan()
            choices = {**plan.choices, self.name: choice_of(program, match.data, config)}
            program.calls = replace(plan, choices=choices)
            return
        found: Pruning = match.data
        stages, packed = found.stages, program.packing is not None
        choice = choice_of(program, Counting(found.counted, stages, found.drops), config)
        counting = {"bucket": config.bucket, "min_image_tokens": config.min_image_tokens}
        extra = []
        if found.types.kind == "extra":
            extra.append("token_types")
        if config.policy == "given":
            if "token_scores" not in given_tokens.given():
                raise ArgumentError(
                    "policy",
                    "given",
                    "a policy whose scores are at hand",
                    "Call within thresher.token_types(types, scores).",
                )
            extra.append("token_scores")
        if config.user_turn:
            extra.append(given_tokens.ASKING)
        try:
            kept, shortened = prune(program, found, config, extra)
        except Stop as reason:
            raise Declined(_sentence(reason)) from reason
        plan = program.calls or CallPlan()
        program.calls = CallPlan(
            {**plan.choices, self.name: choice},
            [*plan.extra_inputs, *extra],
            [*plan.extra_outputs, *kept],
            {**plan.shortened, **{i: Shortened(*s) for i, s in shortened.items()}},
            behind=[Rule("transprune.behind", {**counting, "keep": keep}) for _, keep in stages]
            if packed
            else [],
        )


def _stages(config: TransPruneConfig, tower: Tower) -> tuple[tuple[tuple[int, float], ...], list[Miss]]:
    depth = len(tower.layers)
    given = config.stages
    if not given:
        found: dict[int, float] = {}
        for share, keep in HIGH:
            found[max(1, round(share * depth))] = keep
        given = tuple(found.items())
    misses = [
        Miss(
            f"behind layer {after}",
            f"A stage must have a layer behind it, and of this graph's layers {depth} in a row were recovered.",
        )
        for after, _ in given
        if after >= depth
    ]
    return tuple(s for s in given if s[0] < depth), misses


def _site(tower: Tower, stages: Sequence[tuple[int, float]]) -> str:
    return ", ".join(tower.layers[after - 1].fqn or f"layer {after}" for after, _ in stages)


def _sentence(reason: Exception) -> str:
    text = str(reason)
    return text if text.endswith(".") else f"The layers cannot be run on fewer tokens: {text}."


def _packed(program: Program, config: TransPruneConfig, types: Types) -> tuple[fx.Node, Types]:
    """Offsets of a packed program's sequences, and where types come from in the caller's inputs."""
    if config.per_image:
        raise NotPrunable(
            "The program is packed, and budgets of single images are counted in rows. Leave prepack out."
        )
    if types.kind != "ids":
        raise NotPrunable("The program is packed, and image tokens are found in it by image_token_id only.")
    return offsets_node(program), caller_types(program, config)


def _check_question(packed: bool, sizes: list[int]) -> None:
    """Raise NotPrunable where nobody says which tokens of the call, [batch, tokens], are a user's last turn."""
    if packed:
        raise NotPrunable(
            "The program is packed, and a user's turn is looked for in rows. Leave prepack or user_turn out."
        )
    asked = given_tokens.asked()
    if asked is None or list(asked.shape) != sizes:
        raise NotPrunable(
            "user_turn is looked for in each call's input_ids, which a model of thresher.compile does. Compile it so, or "
            "leave user_turn out."
        )


def _drops_now(
    program: Program,
    types: Types,
    config: TransPruneConfig,
    stages: Any,
    context: Context[TransPruneConfig],
    length: int,
) -> tuple[int, ...]:
    if context.inputs is None:
        context.notes.append("without example inputs, half of the tokens are taken for an image's.")
        return tuple(floor((1 - k) * length / 2) // config.bucket * config.bucket for _, k in stages)
    asked = counts_program(caller(program), types)
    values = asked.run(*context.inputs) if asked is not None else []
    return drops_for(types, config, stages, values, context.inputs, program.packing is not None)
