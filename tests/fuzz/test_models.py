"""Hugging Face models of random configurations, compiled as a user compiles them, over random sequences of calls.

Each chunk compiles SERVED of them, each with a recipe, a precision and a way of calling drawn for it; an example is a
sequence of batches through one of them, with edits of its weights between, from one thread or from three. The oracle
is the model itself in higher precision, as it is at that moment.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from dataclasses import dataclass
from typing import Any

import fuzz
import pytest
import random_models
import torch
from hypothesis import given
from hypothesis import strategies as st

import thresher
from thresher.errors import ArgumentError, NothingRewrittenError

SERVED, EXAMPLES = 6, 80  # in each chunk
EXACT: list[Any] = [
    "exact", "exact", {"prepack": {"min_share": 0.0}, "causal_mask": True, "decode_attention": True},
    {"prepack": {"form": "rows", "min_share": 0.0}}, {"prepack": True, "deft": {"min_bytes": 0}},
]  # fmt: skip
OTHER: list[Any] = [
    {"prepack": True, "nvfp4": {"min_weights": 0, "budget": 2.0}},
    {"nvfp4": {"min_weights": 0, "budget": 2.0, "activations": "int8"}},
    {"prepack": True, "bf16": {"min_weights": 0, "emulate": True, "budget": 2.0}},
]
PRECISIONS = ("float32", "float32", "bfloat16", "float16", "autocast")
WAYS = ("ids", "ids", "positions", "embeds", "cache")
MASKS = (torch.int64, torch.int64, torch.bool, torch.int32, torch.uint8, torch.float32)


@dataclass
class Served:
    """A compiled model. loose: what an approximate recipe may add to its error, else 0. why: it is not compiled, and why."""

    name: str
    model: torch.nn.Module
    fast: Any
    dtype: torch.dtype
    autocast: bool
    way: str
    mask: torch.dtype
    loose: float
    why: str = ""
    edited: bool = False

    def __post_init__(self):
        self.weights = copy.deepcopy(self.model.state_dict())
        self.true = fuzz.in_higher_precision(self.model, self.dtype)

    @property
    def encoder(self) -> bool:
        return self.name in random_models.ENCODERS

    @contextlib.contextmanager
    def around(self):
        """What a thread that calls is in."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            yield

    def inputs(self, batch: fuzz.Batch) -> dict[str, Any]:
        ids, mask = batch.ids(random_models.VOCABULARY), batch.mask()
        given_ = {"input_ids": ids, "attention_mask": mask.to(self.mask)}
        if self.way == "positions":
            given_["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        if self.way == "embeds":
            with torch.no_grad():
                embedded = self.model.get_input_embeddings()(given_.pop("input_ids"))
            given_ = {"inputs_embeds": embedded, **given_}
        return given_ if self.encoder else {**given_, "use_cache": self.way == "cache"}


@functools.lru_cache(maxsize=2 * SERVED)
def served(number: int) -> Served:
    draw = random.Random(f"served {number}")
    name, model = random_models.model(draw, number)
    way, precision = draw.choice(WAYS), draw.choice(PRECISIONS)
    if (name in random_models.ENCODERS and way in ("cache", "positions")) or (
        name in ("opt", "gpt2") and way == "positions"
    ):
        way = "ids"
    if name == "mixtral":
        precision = "float32"  # in others, rounding sends tokens to other experts
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    recipe = draw.choice(OTHER if draw.random() < 0.3 else EXACT)
    made = Served(name, model.to(dtype), None, torch.bfloat16 if precision == "autocast" else dtype,
                  precision == "autocast", way, draw.choice(MASKS), 0.0)  # fmt: skip
    torch._dynamo.reset()
    with made.around():
        try:
            made.fast = thresher.compile(
                made.model, made.inputs(fuzz.Batch((7, 3, 5))), recipe, target="reference", dynamic=True
            )
        except (NothingRewrittenError, ArgumentError) as reason:
            made.why = str(reason)
            return made
    if recipe in OTHER:
        made.loose = 3 * max(made.fast.report.error or 0, 0.1)
    return made


def edit(one: Served, how: str) -> None:
    with torch.no_grad():
        if how == "back":
            one.model.load_state_dict(one.weights)
        else:
            fuzz.EDITS[how](one.model)
    one.true.load_state_dict(one.model.state_dict())
    one.edited = how != "back"


def call(one: Served, batch: fuzz.Batch) -> None:
    """One call, and with a cache the call that continues it."""
    given_, mask = one.inputs(batch), batch.mask()
    wide = {k: v.to(fuzz.WIDER[one.dtype]) if k == "inputs_embeds" else v for k, v in given_.items()}
    with one.around():
        try:
            own = one.model(**given_)
        except (RuntimeError, IndexError, ValueError):
            return  # the model itself takes no such batch
        got = one.fast(**given_)
    with torch.no_grad():
        true = one.true(**wide)
    fuzz.assert_as_good(true[0], own[0], got[0], mask, one.dtype, one.loose)
    if one.way != "cache" or not mask.numel():
        return
    more = {
        "input_ids": torch.full((len(mask), 1), 7),
        "attention_mask": torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], 1).to(one.mask),
    }
    with one.around():
        own, got = (
            m(**more, past_key_values=r.past_key_values) for m, r in ((one.model, own), (one.fast, got))
        )
    with torch.no_grad():
        true = one.true(**more, past_key_values=true.past_key_values)
    fuzz.assert_as_good(true[0], own[0], got[0], None, one.dtype, one.loose)


BATCHES = fuzz.batches((0, 9), (1, 9), empty=True)


@fuzz.chunks
@pytest.mark.filterwarnings("ignore")
def test_calls_give_what_the_model_gives(chunk):
    torch._dynamo.config.recompile_limit, before = 64, torch._dynamo.config.recompile_limit
    seen = {"calls": 0, "declined": 0}
    served_here, examples = fuzz.size(chunk, SERVED, EXAMPLES)

    @fuzz.examples(examples, chunk)
    @given(
        st.integers(0, served_here - 1),
        st.lists(st.tuples(st.sampled_from(["", "", *fuzz.EDITS]), BATCHES), min_size=1, max_size=3),
        st.sampled_from([False, False, False, True]),
    )
    def judge(index, calls, threads):
        one = served(SERVED * chunk + index)
        if one.why:
            seen["declined"] += 1
            return
        seen["calls"] += len(calls)
        if one.edited:
            edit(one, "back")
        if threads:
            fuzz.at_once([functools.partial(call, one, batch) for _, batch in calls for _ in range(2)])
            return
        for how, batch in calls:
            if how:
                edit(one, how)
            call(one, batch)

    try:
        judge()
    finally:
        torch._dynamo.config.recompile_limit = before
    assert seen["calls"] > examples // 2, seen
