"""What a user does with `generate` behind token pruning, for one model of `vlm_zoo`: each method says whether it is right.

"equal" is said of the logits and tokens of every step; anything else is what was wrong.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import vlm_zoo

import thresher
from thresher.generation.request import argument_of_caches

NEW = 5
PRUNE = dict(min_image_tokens=2, bucket=1, min_saving=0.0)
ASKED = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
ROWS = (1, 2)  # images of each row


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


def longer(batch: vlm_zoo.Batch, sequences: torch.Tensor) -> vlm_zoo.Batch:
    """A second turn: what was said, and six more tokens."""
    more = torch.randint(2, 100, (sequences.shape[0], 6), generator=torch.Generator().manual_seed(9))
    ids = torch.cat([sequences, more], 1)
    new = ids.shape[1] - batch["attention_mask"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(ids), new, dtype=torch.long)], 1)
    beside = {}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in batch:
            beside[name] = torch.nn.functional.pad(batch[name], (0, new))
    return {"input_ids": ids, "attention_mask": mask, **beside}


class Case:
    """One class; each method fills one column."""

    def __init__(self, name: str):
        self.name, self.model = name, vlm_zoo.build(name)
        self.batch = vlm_zoo.batch(name, self.model, ROWS)
        self.image = vlm_zoo.ZOO[name].mark
        self._made: dict[str, Any] = {}

    def compiled(self, share: float, **options: Any) -> Any:
        key = f"{share}{options}"
        if key not in self._made:
            recipe = options or dict(transprune=dict(PRUNE, stages=((1, share),), always=share == 1.0))
            self._made[key] = thresher.compile(self.model, self.batch, target="reference", **recipe)
        return self._made[key]

    def whole(self) -> str:
        expected = self.model.generate(**self.batch, **ASKED)
        return verdict(difference(self.compiled(1.0).generate(**self.batch, **ASKED), expected))

    def text(self) -> str:
        given = vlm_zoo.batch(self.name, self.model, (0, 0, 0))
        expected = self.model.generate(**given, **ASKED)
        fast = self.compiled(0.5)
        fast.generate(**self.batch, **ASKED)
        return verdict(difference(fast.generate(**given, **ASKED), expected))

    def turn(self) -> str:
        name, found = argument_of_caches(), []
        for generate in (self.model.generate, self.compiled(1.0).generate):
            first = generate(**self.batch, **ASKED)
            given = longer(self.batch, first.sequences)
            try:
                found.append(generate(**given, **{name: cache_of(first)}, **ASKED))
            except Exception as error:
                if not found:
                    return f"not in transformers: {type(error).__name__}"
                raise
        fast = self.compiled(0.5)
        first = fast.generate(**self.batch, **ASKED)
        fast.generate(**longer(self.batch, first.sequences), **{name: cache_of(first)}, **ASKED)
        return verdict(difference(found[1], found[0]))

    def cut(self) -> str:
        """The first token's logits beside those of the model's own layers, cut by hooks at the tokens kept."""
        alone = vlm_zoo.row(self.batch, ROWS, 1)
        fast = self.compiled(0.5)
        out = fast.generate(**alone, **ASKED | {"max_new_tokens": 1})
        length = alone["input_ids"].shape[1]
        layer = cache_of(out).own[-1]
        at = layer.positions[0].long()
        at = at[(at >= 0) & (at < length)]
        images = int((alone["input_ids"] == self.image).sum())
        if length - len(at) != images - round(images * 0.5):
            return f"WRONG, {len(at)} of {length} tokens kept, {images} of them an image's"
        with torch.no_grad(), cut_by_hand(self.model, 1, at, length):
            expected = self.model(**alone).logits[:, -1]
        return verdict(((out.logits[0] - expected).abs().max() / expected.abs().max()).item())

    def rows(self) -> str:
        fast = self.compiled(0.5)
        together, worst = fast.generate(**self.batch, **ASKED), 0.0
        saved = fast.last_call.bytes < fast.last_call.dense_bytes
        for index in range(len(ROWS)):
            alone = fast.generate(**vlm_zoo.row(self.batch, ROWS, index), **ASKED)
            worst = max(worst, difference(alone, _row_of(together, index)))
        return verdict(worst) if saved else "WRONG, nothing was left out"

    def zipvl(self) -> str:
        """Two equal rows beside one of them: a batch has one count, so that rows of other lengths are given other shares."""
        options = dict(keep=0.5, recent=4, spread=4, bucket=1, min_saving=0.0, kv="drop")
        alone = vlm_zoo.row(self.batch, ROWS, 1)
        fast = self.compiled(0.5, zipvl=options)
        one = fast.generate(**alone, **ASKED)
        two = fast.generate(**{k: torch.cat([v, v]) for k, v in alone.items()}, **ASKED)
        if not fast.last_call.bytes < fast.last_call.dense_bytes:
            return "WRONG, nothing was left out"
        return verdict(max(difference(one, _row_of(two, index)) for index in range(2)))


def _row_of(out: Any, index: int) -> Any:
    row = slice(index, index + 1)
    return types.SimpleNamespace(sequences=out.sequences[row], logits=[step[row] for step in out.logits])


class cut_by_hand:
    """Within the context, decoder layers from `first` on compute the tokens `at` of a row of `length` only."""

    def __init__(self, model: Any, first: int, at: torch.Tensor, length: int):
        self.layers = list(model.get_decoder().layers)[first:]
        self.at, self.length = at, length

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.forward = self._short(layer, layer.forward)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def _gathered(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            for dim, size in enumerate(given.shape):
                if size == self.length:
                    given = given.index_select(dim, self.at)
        elif isinstance(given, tuple):
            given = tuple(map(self._gathered, given))
        return given

    def _short(self, layer: Any, forward: Any) -> Any:
        def short(hidden: torch.Tensor, *args: Any, **named: Any) -> Any:
            named = {k: self._gathered(v) for k, v in named.items()}
            out = forward(self._gathered(hidden), *map(self._gathered, args), **named)
            states = out[0] if isinstance(out, tuple) else out
            whole = hidden.index_copy(1, self.at, states)
            return (whole, *out[1:]) if isinstance(out, tuple) else whole

        return short
