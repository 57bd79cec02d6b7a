"""How many tokens a call can spare: asked before each call, outside the compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

from thresher.graph.call_rules import rule

from ..tokens.types import Types, image_counts, image_runs, types_from
from .config import TransPruneConfig
from .rows import going


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
