"""`generate` of random decoders with random options, through programs and steps in C++ as a user's CPU runs them.

Only Inductor's own compiler is left out: what it would compile runs as it stands. The oracle is the model's own `generate`:
logits alike up to a row's first other token, which two nearly equal ones may bring about. A model with rounded weights is
held to its own call over the whole sequence.
"""

from __future__ import annotations

import functools
import random
from typing import Any
from unittest import mock

import fuzz
import pytest
import random_models
import torch
from hypothesis import given
from hypothesis import strategies as st

import thresher
from thresher.lowering.inductor import inductor

MODELS, EXAMPLES = 2, 24  # in each chunk
RECIPES: list[Any] = ["exact", "exact", {"prepack": {"min_share": 0.0}},
                      {"nvfp4": {"min_weights": 0, "budget": 2.0}}]  # fmt: skip
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-1}
made_steps = []


def _as_it_stands(module, *_):
    module.recompile()
    return module.forward


@pytest.fixture(autouse=True)
def without_a_compiler():
    def lower(graph, lower=inductor.steps.lower):
        step = lower(graph)
        made_steps.extend([step] if step is not None else [])
        return step

    with (
        mock.patch.object(inductor, "_compile", _as_it_stands),
        mock.patch.object(inductor.steps, "lower", lower),
        mock.patch.object(torch._dynamo.config, "recompile_limit", 64),
    ):
        yield


@functools.lru_cache(maxsize=2 * MODELS)
def served(number: int) -> tuple[torch.nn.Module, Any, bool]:
    """A model, compiled, and whether its weights were rounded. number: kinds of models have their turns, encoders none."""
    draw = random.Random(f"generate {number}")
    name, model = random_models.model(draw, 6 * number + draw.choice((0, 2, 2, 3, 4, 5)))
    if name != "mixtral" and draw.random() < 0.25:
        model = model.to(torch.bfloat16)
    recipe = draw.choice(RECIPES)
    torch._dynamo.reset()
    return (
        model,
        thresher.compile(model, prompt(fuzz.Batch((7, 3, 5), "left")), recipe, dynamic=True),
        "nvfp4" in recipe,
    )


def prompt(batch: fuzz.Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.ids(random_models.VOCABULARY), "attention_mask": batch.mask().long()}


@st.composite
def options(draw) -> dict[str, Any]:
    found: dict[str, Any] = dict(max_new_tokens=draw(st.integers(1, 6)), pad_token_id=0)
    found["num_beams"] = draw(st.sampled_from([1, 1, 1, 2, 3]))
    found["do_sample"] = draw(st.booleans()) if found["num_beams"] == 1 else False
    copies = st.integers(1, 3 if found["do_sample"] else found["num_beams"])
    found["num_return_sequences"] = draw(copies)
    found["cache_implementation"] = draw(st.sampled_from([None, None, "static"]))
    found["eos_token_id"] = draw(st.sampled_from([None, 2, [2, 5, 7, 11]]))
    found["repetition_penalty"] = draw(st.sampled_from([1.0, 1.3]))
    found["use_cache"] = draw(st.sampled_from([True, True, True, False]))
    if not found["use_cache"]:
        found["cache_implementation"] = None
    return found


BATCHES = st.builds(
    fuzz.Batch, st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), st.just("left"), st.just(False),
    st.integers(0, 3),
)  # fmt: skip


def judge(
    model: torch.nn.Module, fast: Any, rounded: bool, batch: fuzz.Batch, given_: dict[str, Any], seed: int
) -> None:
    asked = {**prompt(batch), **given_, "return_dict_in_generate": True, "output_logits": True}
    asked["output_scores"] = given_["num_beams"] > 1
    near = TOLERANCE[model.dtype]

    def run(one):
        if given_["do_sample"]:
            torch.manual_seed(seed)
        with torch.no_grad():
            return one.generate(**asked, **({"wait": True} if one is fast else {}))

    if rounded and given_["num_beams"] == 1:
        got = run(fast)
        compare(whole(fast, got.sequences, asked, len(got.logits)), got, got, batch, near)
        return
    if rounded:
        return
    own, got = run(model), run(fast)
    if given_["num_beams"] == 1:
        compare(torch.stack(own.logits, 1), own, got, batch, near)
    elif not torch.equal(own.sequences, got.sequences):
        torch.testing.assert_close(got.sequences_scores, own.sequences_scores, rtol=0, atol=10 * near)


def whole(fast: Any, sequences: torch.Tensor, asked: dict[str, Any], steps: int) -> torch.Tensor:
    """Logits [rows, steps, vocabulary] of one call over what was generated."""
    copies = len(sequences) // len(asked["input_ids"])
    mask = asked["attention_mask"].repeat_interleave(copies, 0)
    mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], 1)
    given_ = dict(input_ids=sequences, attention_mask=mask, use_cache=False)
    if "position_ids" in fast.forward.__signature__.parameters:
        given_["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return fast(**given_).logits[:, -steps - 1 : -1]


def compare(expected: torch.Tensor, own: Any, got: Any, batch: fuzz.Batch, near: float) -> None:
    """Rows' logits [rows, steps, vocabulary], each up to its first other token."""
    found = torch.stack(got.logits, 1)
    first = batch.mask().shape[1]
    for row, (a, b) in enumerate(zip(own.sequences[:, first:], got.sequences[:, first:])):
        count = min(len(a), len(b))
        alike = int((a[:count] == b[:count]).long().cumprod(0).sum())
        steps = slice(0, min(alike + 1, count, found.shape[1], expected.shape[1]))
        true = expected[row, steps].double()
        off = (found[row, steps].double() - true).abs().max() / true.abs().max().clamp_min(1e-3)
        assert off <= near, f"row {row} is {off:.2g} off within {steps.stop} steps"


@pytest.mark.thorough
@fuzz.chunks
@pytest.mark.filterwarnings("ignore")
def test_generate_gives_what_the_model_gives(chunk):
    made_steps.clear()

    @fuzz.examples(EXAMPLES, chunk)
    @given(
        st.integers(0, MODELS - 1), BATCHES, BATCHES, options(), st.sampled_from(["", "", "in place", "data", "load"]),
        st.integers(0, 3),
    )  # fmt: skip
    def example(index, batch, other, given_, how, seed):
        model, fast, rounded = served(MODELS * chunk + index)
        if how:
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            with torch.no_grad():
                fuzz.EDITS[how](model)
        try:
            judge(model, fast, rounded, batch, given_, seed)
            if not given_["do_sample"] and seed == 0:  # the generator of random numbers is the process's
                work = [
                    functools.partial(judge, model, fast, rounded, b, given_, seed) for b in (batch, other)
                ]
                fuzz.at_once(work)
        finally:
            if how:
                model.load_state_dict(weights)

    example()
    assert made_steps
