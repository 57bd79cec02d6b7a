"""Random small transformers times random recipes times random batches: as near to the truth as eager is, or refused.

What is captured and cut is shared between examples, so that one takes a third of a second.
"""

from __future__ import annotations

import functools
import random

import captures
import fuzz
import pytest
import random_recipes
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_transformer import VOCABULARY, Net, Shape

from thresher import backend
from thresher.errors import ContractError, DialectError, ThresherError
from thresher.lowering.reference import Reference
from thresher.passes.prepack import prepack
from thresher.recipe import Recipe
from thresher.runtime.compare import run_plainly

MODELS, EXAMPLES = 8, 120  # in each chunk


@functools.lru_cache(maxsize=MODELS)
def captured(number: int):
    """A model, the same in double precision, and its Program."""
    torch.manual_seed(number)
    model = Net(Shape.random(random.Random(number))).eval()
    program = captures.export(model, inputs(fuzz.Batch((3, 7, 5))), dynamic=True)
    return model, fuzz.in_higher_precision(model, torch.float32), program


def inputs(batch: fuzz.Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.ids(VOCABULARY), "attention_mask": batch.mask().long()}


@pytest.fixture(scope="module", autouse=True)
def each_program_cut_once():
    """Cutting out the packed body traces it anew, half of an example's time, and gives the same for the same program:
    what varies between examples is which passes come before and behind it."""
    cut, known = prepack.cut, {}

    def remembered(padded, found, packing):
        key = (padded.text(), tuple(id(w.tensor) for w in padded.weights.values()), packing)
        if key not in known:
            known[key] = cut(padded, found, packing)
        layout, body = known[key]
        return layout, body.copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepack, "cut", remembered)
        yield


BATCHES = fuzz.batches((2, 4), (1, 9), wide=2)


@fuzz.chunks
def test_as_near_to_the_truth_as_eager_or_refused(chunk):
    seen = {"rewritten": 0, "refused": 0, "exact": 0}
    models, examples = fuzz.size(chunk, MODELS, EXAMPLES)

    @fuzz.examples(examples, chunk)
    @given(st.integers(0, models - 1), random_recipes.recipes(), BATCHES, BATCHES)
    def judge(index, recipe, shown, other):
        model, true, program = captured(MODELS * chunk + index)
        try:
            chosen = Recipe.of(recipe)
            rewritten, report = backend.run_pipeline(
                program, chosen, captures.arguments(program, inputs(shown))
            )
        except ThresherError as refusal:
            assert not isinstance(refusal, (ContractError, DialectError)), (
                refusal
            )  # faults of ours, no refusals
            assert len(str(refusal).split()) > 3
            seen["refused"] += 1
            return
        assert report.error is not None and report.error <= report.budget
        seen["rewritten"] += report.rewritten > 0
        exact = all(p.exact for p in report.passes if p.rewritten)
        seen["exact"] += exact and report.rewritten > 0
        for batch in (shown, other):
            given_, mask = inputs(batch), batch.mask()
            with torch.no_grad():
                own, wide = model(**given_), true(**given_)
            got = run(rewritten, program, given_)
            real = mask if own.dim() == 3 else mask[:, 0]  # of a first column, rows where it is a token
            fuzz.assert_as_good(wide, own, got, real, torch.float32, 0.0 if exact else report.budget)
            if not exact:  # which row a text stands in makes no difference
                again = run(rewritten, program, {k: v.flip(0) for k, v in given_.items()}).flip(0)
                fuzz.assert_as_good(got, got, again, real, torch.float32, 0.05)

    judge()
    assert seen["rewritten"] > examples // 2 and seen["exact"] > examples // 6, (
        seen
    )  # most recipes must do something
    assert seen["refused"] < examples // 4, seen


def run(rewritten, program, given_):
    """A program's first result."""
    return run_plainly(rewritten, captures.arguments(program, given_), Reference())[0]
