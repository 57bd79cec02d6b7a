"""What a user does with `generate` behind token pruning, for one model of `vlm_zoo`: each method says whether it is right.

"equal" is said of the logits of every step; anything else is what was wrong. What is compared with: the model's own
`generate`, or one call of the model itself over a row and all that was said, with its layers cut by hand (see `by_hand`).
"""

from __future__ import annotations

import copy
from typing import Any

import by_hand
import torch
import vlm_models
import vlm_zoo

import thresher
from thresher.compiled import Compiled
from thresher.errors import NothingRewrittenError
from thresher.generation.request import argument_of_caches
from thresher.recipe import Recipe
from thresher.undone import rewrote_nothing

NEW = 4
PRUNE = dict(min_image_tokens=2, bucket=1, min_saving=0.0)
ASKED = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
             suppress_tokens=list(vlm_models.MARKS))  # fmt: skip
ROWS = (1, 2)  # images of each row
KEEP = 0.5
ZIP = dict(keep=KEEP, recent=4, spread=4, bucket=1, min_saving=-9.0, kv="drop")


def cache_of(out: Any) -> Any:
    return out["cache"] if "cache" in out else out["past_key_values"]


def difference(one: Any, other: Any) -> float:
    """The largest difference of logits, of any step, over the largest logit; infinite where tokens differ."""
    if not torch.equal(one.sequences[:, -NEW:], other.sequences[:, -NEW:]):
        return float("inf")
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one.logits, other.logits, strict=True)
    )


def verdict(error: float) -> str:
    return "equal" if error < 1e-3 else f"WRONG, {error:.2g} off"


def longer(name: str, batch: vlm_zoo.Batch, sequences: torch.Tensor) -> vlm_zoo.Batch:
    """A second turn: what was said, and six more tokens."""
    more = torch.randint(2, 100, (sequences.shape[0], 6), generator=torch.Generator().manual_seed(9))
    return vlm_zoo.extended(name, batch, torch.cat([sequences, more], 1), media=False)


class Case:
    """One class; each method fills one column."""

    def __init__(self, name: str):
        self.name, self.model = name, vlm_zoo.build(name)
        self.batch = vlm_zoo.batch(name, self.model, ROWS)
        self.mark = vlm_zoo.ZOO[name].mark
        self._made: dict[str, Any] = {}
        self._said: dict[Any, Any] = {}

    def compiled(self, **recipe: Any) -> Any:
        """The model as `generate` compiles it at its first call; half of the image tokens kept, if nothing else is said."""
        recipe = recipe or dict(transprune=dict(PRUNE, stages=((1, KEEP),)))
        key = str(recipe)
        if key not in self._made:
            self._made[key] = Compiled(self.model, Recipe.of(None, **recipe), target="reference")
        return self._made[key]

    def whole(self) -> str:
        """Nothing left out, both rows together: the model's own logits."""
        recipe = dict(transprune=dict(PRUNE, stages=((1, 1.0),), always=True))
        fast = thresher.compile(self.model, self.batch, target="reference", **recipe)
        return verdict(
            difference(fast.generate(**self.batch, **ASKED), self.model.generate(**self.batch, **ASKED))
        )

    def text(self) -> str:
        """Rows without images, before a call with some, which is pruned all the same, and behind it."""
        given = vlm_zoo.batch(self.name, self.model, (0, 0, 0))
        expected = self.model.generate(**given, **ASKED)
        first = self.compiled().generate(**given, **ASKED)
        self.said("alone")
        return verdict(
            max(difference(one, expected) for one in (first, self.compiled().generate(**given, **ASKED)))
        )

    def cut(self) -> str:
        """A row of two images alone, half of them left out."""
        return self._beside("alone", 1, turn=0)

    def rows(self) -> str:
        """Rows of one and two images, left-padded, half of each left out."""
        return self._worst([self._beside("batch", row, turn=0) for row in range(len(ROWS))])

    def turn(self) -> str:
        """A second question on the pruned caches of both."""
        own = self._second_turn_of_the_models_own()
        if own is not None:
            return own
        found = [self._beside("batch", row, turn=1) for row in range(len(ROWS))]
        return self._worst([self._beside("alone", 1, turn=1), *found])

    def zipvl(self) -> str:
        """Rows of one and two images, left-padded: what each attention's map, written out, lets attend."""
        given = self.batch
        fast = self.compiled(zipvl=ZIP)
        out = fast.generate(**given, **ASKED)
        _check_shorter(fast)
        chosen = by_hand.Zip(
            ZIP,
            given["attention_mask"].shape[1],
            self._text(given),
            [s.shape[2] - NEW + 1 for s in _keys(out)],
        )
        return self._worst(
            [
                verdict(self._error(out.logits, out.sequences, given, row, chosen.of))
                for row in range(len(ROWS))
            ]
        )

    def half(self) -> str:
        """As `cut` in bf16: no further from the model cut by hand in fp32 than the model cut by hand in bf16 is."""
        wide, made = self.model, self._made
        given, length = self._alone()
        self.model, self._made = copy.deepcopy(wide).bfloat16(), {}
        narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
        try:
            out = self.compiled().generate(**narrow, **ASKED)
            kept = _kept(out, 0, 0, length)
            ours = torch.cat(out.logits).float()
            slow = self._logits(self.model, narrow, out.sequences, kept)[length - 1 : -1].float()
            exact = self._logits(wide, given, out.sequences, kept)[length - 1 : -1]
        finally:
            self.model, self._made = wide, made
        off, own = ((t - exact).abs().mean().item() for t in (ours, slow))
        return "equal" if off <= 1.5 * own else f"WRONG, {off:.2g} off and its own {own:.2g}"

    # -- what was said, and what the model itself makes of it ----------------------------------------------------------

    def said(self, which: str) -> tuple[Any, Any, list[torch.Tensor]]:
        """Two turns: the first's result, the second's, and each row's kept tokens of the prompt.

        which: "alone", the row of two images without its padding; or "batch".
        """
        if which not in self._said:
            given = self._alone()[0] if which == "alone" else self.batch
            fast = self.compiled()
            first = fast.generate(**given, **ASKED)
            _check_shorter(fast)
            length = given["attention_mask"].shape[1]
            starts = (given["attention_mask"] == 0).sum(1).tolist()
            kept = [_kept(first, row, start, length) for row, start in enumerate(starts)]
            self._said[which] = first, kept
        return self._said[which]

    def _second(self, which: str) -> Any:
        key = f"{which}, second"
        if key not in self._said:
            first, _ = self.said(which)
            given = self._alone()[0] if which == "alone" else self.batch
            cache = {argument_of_caches(): cache_of(first)}
            self._said[key] = self.compiled().generate(
                **longer(self.name, given, first.sequences), **cache, **ASKED
            )
        return self._said[key]

    def _beside(self, which: str, row: int, turn: int) -> str:
        """A row's logits of a turn beside the model's own, cut by hand at the tokens that were kept."""
        given = self._alone()[0] if which == "alone" else self.batch
        at = 0 if which == "alone" else row
        first, kept = self.said(which)
        images = int((given["input_ids"][at] == self.mark).sum())
        real = int(given["attention_mask"][at].sum())
        if real - len(kept[at]) != images - round(images * KEEP):
            return f"WRONG, {len(kept[at])} of {real} tokens kept, {images} of them an image's"
        out = first if turn == 0 else self._second(which)
        return verdict(self._error(out.logits, out.sequences, given, at, lambda _: kept[at]))

    def _error(self, logits: Any, sequences: torch.Tensor, given: Any, row: int, kept: Any) -> float:
        """How far the logits of the last tokens of a row are from those of one call of the model, cut by hand."""
        rows = (ROWS[1],) if len(given["input_ids"]) == 1 else ROWS
        alone = vlm_zoo.row(given, rows, row)
        start = given["input_ids"].shape[1] - alone["input_ids"].shape[1]
        expected = self._logits(self.model, alone, sequences[row : row + 1, start:], kept(row))
        expected = expected[-len(logits) - 1 : -1]
        actual = torch.stack([step[row] for step in logits])
        return ((actual - expected).abs().amax(1) / expected.abs().amax(1)).max().item()

    @torch.no_grad()
    def _logits(self, model: Any, alone: Any, sequence: torch.Tensor, kept: Any) -> torch.Tensor:
        """[tokens, vocabulary] of a row that goes on as `sequence`, cut by hand."""
        given = vlm_zoo.extended(self.name, alone, sequence, media=True)
        length, prompt = sequence.shape[1], alone["input_ids"].shape[1]
        if isinstance(kept, torch.Tensor):
            at = torch.cat([kept, torch.arange(prompt, length)])
            inside: Any = by_hand.cut(model, 1, at, length)
        else:
            inside = by_hand.zipped(model, kept, prompt)
        with inside:
            return model(**given).logits[0]

    def _alone(self) -> tuple[vlm_zoo.Batch, int]:
        alone = vlm_zoo.row(self.batch, ROWS, 1)
        return alone, alone["input_ids"].shape[1]

    def _text(self, given: vlm_zoo.Batch) -> list[torch.Tensor]:
        """Of each row, without its padding, which tokens are text."""
        return [
            ids[mask.bool()] != self.mark for ids, mask in zip(given["input_ids"], given["attention_mask"])
        ]

    def _second_turn_of_the_models_own(self) -> str | None:
        """Why the model itself cannot take a second turn on its cache; None where it can."""
        try:
            first = self.model.generate(**self.batch, **ASKED)
            cache = {argument_of_caches(): cache_of(first)}
            self.model.generate(**longer(self.name, self.batch, first.sequences), **cache, **ASKED)
        except Exception as error:
            return f"not in transformers: {type(error).__name__}"
        return None

    def _worst(self, found: list[str]) -> str:
        return next((said for said in found if said != "equal"), "equal")


def _check_shorter(fast: Any) -> None:
    """Raise where nothing was left out: what thresher.compile raises there, or AssertionError where it would not."""
    reason = rewrote_nothing(fast.reports)
    if reason is not None:
        raise NothingRewrittenError(reason)
    assert fast.last_call.bytes < fast.last_call.dense_bytes, "nothing was left out"


def _kept(out: Any, row: int, start: int, length: int) -> torch.Tensor:
    """Tokens of a row's prompt, counted without its padding, that the last layer remembers."""
    at = cache_of(out).own[-1].positions[row].long()
    return at[(at >= start) & (at < length)] - start


def _keys(out: Any) -> list[torch.Tensor]:
    return [layer.keys for layer in cache_of(out).own]
