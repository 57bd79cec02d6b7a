"""How many tokens a call can spare: asked before each call, outside the compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from thresher.graph.call_plan import Choice
from thresher.graph.call_rules import Rule, rule
from thresher.graph.program import Program

from ..base import Context
from ..structure.recover import Tower
from ..tokens.segments import caller
from ..tokens.towers import layer_flops
from ..tokens.types import (
    NotPrunable,
    Types,
    counts_program,
    image_counts,
    image_runs,
    types_facts,
    types_from,
)
from .config import TransPruneConfig
from .rows import going


@dataclass
class Counting:
    """Of a program that leaves nothing out, since the call it was built for has nothing to spare, and others may.

    types: where their token types come from. drops: what the call could spare, too little to be worth it, or nothing.
    """

    types: Types
    stages: Sequence[tuple[int, float]]
    drops: tuple[int, ...]


class NothingToSpare(NotPrunable):
    """Why a call leaves nothing out. later: how other calls are counted, which may; None where they are like this one."""

    def __init__(self, reason: str, later: Counting | None):
        super().__init__(reason)
        self.later = later


def choice_of(program: Program, found: Counting, config: TransPruneConfig) -> Choice:
    """How a call says what it can spare."""
    facts = {
        "bucket": config.bucket,
        "min_image_tokens": config.min_image_tokens,
        "types": types_facts(found.types),
        "stages": [[*s] for s in found.stages],
        "packed": program.packing is not None,
        "per_image": config.per_image,
    }
    asked = counts_program(caller(program), found.types)
    return Choice(found.drops, asked, Rule("transprune.drops", facts))


def drops_for(
    types: Types,
    config: TransPruneConfig,
    stages: Sequence[tuple[int, float]],
    values: Sequence[Any],
    inputs: Sequence[Any],
    packed: bool = False,
) -> tuple[int, ...]:
    """How many tokens every row can spare behind each stage; of packed rows, how many all can spare together.

    values: of `counts_program`.
    """
    image, pads = image_counts(types, values, inputs)
    each = image_runs(types, values, inputs) if config.per_image and image is not None else None
    if image is None:
        return (0,) * len(stages)
    found: list[int] = []
    for _, keep in stages:
        if packed:
            spare = sum(_going(config, keep, count) for count in image)
        else:
            gone = [going(config, keep, n, each[i] if each else None) for i, n in enumerate(image)]
            spare = min(go + pad for go, pad in zip(gone, pads)) if any(gone) else 0
        found.append(max([spare // config.bucket * config.bucket, *found[-1:]]))
    return tuple(found)


def _going(config: TransPruneConfig, keep: float, images: int) -> int:
    """How many of a packed sequence's image tokens go where a share of them is kept."""
    if images < config.min_image_tokens:
        return 0
    return min(images - 1, floor((1 - keep) * images + 1e-6))


@rule("transprune.drops")
def _drops(facts: Any, _: Any, values: Sequence[Any], inputs: Sequence[Any]) -> tuple[int, ...]:
    """What a call can spare; see `Choice.decide`."""
    config = TransPruneConfig(
        bucket=facts["bucket"],
        min_image_tokens=facts["min_image_tokens"],
        per_image=facts.get("per_image", False),
    )
    return drops_for(types_from(facts["types"]), config, facts["stages"], values, inputs, facts["packed"])


@rule("transprune.behind")
def _behind(facts: Any, _: Any, lengths: Sequence[int], images: Sequence[int]) -> list[int]:
    """What a cut leaves of packed sequences; see `CallPlan.behind`."""
    config = TransPruneConfig(bucket=facts["bucket"], min_image_tokens=facts["min_image_tokens"])
    return [n - _going(config, facts["keep"], i) for n, i in zip(lengths, images)]


def too_little(
    context: Context[TransPruneConfig], tower: Tower, stages: Any, drops: Sequence[int], length: int
) -> str | None:
    """Fill in what is predicted; why that is too little, or None."""
    left = [length] * len(tower.layers)
    for (after, _), drop in zip(stages, drops):
        left[after:] = [length - drop] * (len(tower.layers) - after)
    dense = sum(sum(layer_flops(layer, length)) for layer in tower.layers)
    pruned = sum(sum(layer_flops(layer, n)) for layer, n in zip(tower.layers, left))
    context.flops.update(before=dense, after=pruned)
    saving = 1 - pruned / dense
    if saving < context.config.min_saving and not context.config.always:
        return f"Only {saving:.1%} of the layers' FLOPs would be saved, and min_saving is {context.config.min_saving:.0%}."
    return None
