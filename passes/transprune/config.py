"""The options of token pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thresher.errors import ArgumentError
from thresher.recipe import PassConfig

from .scores import POLICIES

RESTORE = ("zeros", "passthrough", "none")
MODES = ("paper", "official_code")
POSITION = ("kept", "renumbered")
RESERVE_BY = ("even", "keys", "attention")


@dataclass(frozen=True)
class TransPruneConfig(PassConfig):
    """Options of token pruning.

    policy: transprune, ttv, iga, fastv, pyramiddrop, uniform, random, or given.
    mode: "paper" or "official_code", whose arithmetic differs (see kernels/tokens/transition.py).
    stages: (after_layer, keep) pairs: layers count from one, keep is the share of the original image tokens.
        Empty: the paper's High schedule, scaled to the model's depth.
    instruction: at most so many tokens behind the image ask for attention.
    user_turn: the ids of what a chat template writes before and behind a user's words, two tuples, as
        `thresher.tools.chat.user_turn(tokenizer)` gives them. Only the last such turn then asks, where some of it
        stands behind the image. Empty: all text there asks, the template's own too.
    accumulate_from: first layer whose transitions count; None: the first stage's.
    reserve: share of the kept tokens that is chosen whatever the question, which later questions need: by `reserve_by`,
        "even", spread over the image; "keys", those with the longest keys in the next layer; or "attention", those that the
        image itself looks at there, `instruction` of its tokens being asked.
    restore: what results have at tokens left out. "zeros"; "passthrough": the hidden state they left with,
        through final norm and head; "none": such results are shorter. Keys and values always are.
    position: "kept", or "renumbered" as in the published code: kept tokens stand side by side behind a cut, up to
        the prompt's end, for models with rotary positions.
    keep is a share of each row's image tokens; padding never counts. per_image: of each image's, an image being
        image tokens that stand side by side.
    min_image_tokens: rows with fewer keep them all. min_saving: least share of the layers' FLOPs to save.
    bucket: tokens left out are a multiple of this; a larger one makes fewer programs.
    image_token_id, image_span: which ids, or which columns, are the image, where the graph does not tell.
    seed: of the random policy. budget: largest relative change of results at kept tokens.
    choice: tokens each stage leaves out; None to count them. always: cut even where none goes, for tests.
    """

    name = "transprune"
    policy: str = "transprune"
    mode: str = "paper"
    stages: tuple[tuple[int, float], ...] = ()
    instruction: int = 32
    user_turn: tuple[tuple[int, ...], ...] = ()
    accumulate_from: int | None = None
    reserve: float = 0.0
    reserve_by: str = "even"
    restore: str = "zeros"
    position: str = "kept"
    per_image: bool = False
    min_image_tokens: int = 64
    min_saving: float = 0.05
    bucket: int = 16
    image_token_id: int | None = None
    image_span: tuple[int, int] | None = None
    seed: int = 0
    budget: float = float("inf")
    choice: tuple[int, ...] | None = None
    always: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stages, (list, tuple)):  # else a recipe refuses it by name
            object.__setattr__(self, "stages", _tuples(self.stages))
        if isinstance(self.user_turn, (list, tuple)):
            object.__setattr__(self, "user_turn", _tuples(self.user_turn))

    def validate(self) -> None:
        self.one_of(policy=POLICIES, mode=MODES, restore=RESTORE, position=POSITION, reserve_by=RESERVE_BY)
        for stage in self.stages:
            if len(stage) != 2:
                raise ArgumentError("stages", stage, "pairs (after_layer, keep)", "Write ((2, 0.25),).")
            after, keep = stage
            if after < 1:
                raise ArgumentError("stages", f"after_layer {after}", "at least 1", "Layers count from one.")
            if not 0 < keep <= 1:
                raise ArgumentError(
                    "stages", f"keep {keep}", "a share above 0, at most 1", "0.25 keeps a quarter."
                )
        for (a, k), (b, l) in zip(self.stages, self.stages[1:]):
            if b <= a or l > k:
                raise ArgumentError(
                    "stages",
                    self.stages,
                    "rising layers and falling shares",
                    "Each stage keeps a part of the last.",
                )
        self.at_least(instruction=1, bucket=1, min_image_tokens=1)
        if self.accumulate_from is not None and self.accumulate_from < 1:
            raise ArgumentError(
                "accumulate_from", self.accumulate_from, "at least 1", "Layers count from one."
            )
        self.within(0, 1, "reserve")
        self.within(float("-inf"), 1, "min_saving")  # below 0: also where it costs
        self.within(0, float("inf"), "budget", "image_token_id")
        if self.user_turn and (len(self.user_turn) != 2 or not self.user_turn[0]):
            raise ArgumentError(
                "user_turn",
                self.user_turn,
                "two tuples of ids, of which the first is not empty",
                "Take thresher.tools.chat.user_turn(tokenizer).",
            )
        if self.per_image and self.reserve:
            raise ArgumentError("reserve", self.reserve, "0 with per_image=True", "Leave one of them out.")


def _tuples(given: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(s) if isinstance(s, (list, tuple)) else s for s in given)
