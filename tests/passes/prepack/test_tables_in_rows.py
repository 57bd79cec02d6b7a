"""Rows that sequences share hold other positions each: tables of positions are taken for each row."""

import captures
import fuzz
import pytest
import torch
from random_transformer import VOCABULARY, Net, Shape
from sampled import sampled

from thresher import backend
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime.compare import run_plainly

COMMON = dict(layers=1, size=8, hidden=20, activation="gelu", gated=True, norm="rms", post=False, bias=True,
              head="none", window=0, experts=0, repeat=False)  # fmt: skip


def inputs(*lengths):
    batch = fuzz.Batch(lengths)
    return {"input_ids": batch.ids(VOCABULARY), "attention_mask": batch.mask().long()}


ROPES, MASKS = ("half", "pairs", "partial", "none"), ("padding", "causal float")
PLAIN = [
    ("half", "padding", True),
    ("half", "causal float", False),
    ("pairs", "causal float", False),
    ("partial", "padding", True),
    ("none", "causal float", True),
]


@pytest.mark.parametrize("rope, mask, fused", sampled(PLAIN, ROPES, MASKS, (False, True)))
def test_rows_of_different_positions(rope, mask, fused):
    torch.manual_seed(0)
    model = Net(Shape(**COMMON, heads=2, kv_heads=1, rope=rope, mask=mask, fused=fused)).eval()
    program = captures.export(model, inputs(3, 7, 5), dynamic=True)
    for capacity in (0, 7):
        recipe = Recipe.of(prepack={"form": "rows", "capacity": capacity, "min_share": 0.0, "min_gain": 0.0})
        # four rows of capacity 7, and as many rows as heads: a table taken for heads would not even be noticed
        shown = captures.arguments(program, inputs(6, 6, 6, 6, 1))
        rewritten, report = backend.run_pipeline(program, recipe, shown)
        assert report.rewritten == 1, report["prepack"].missed
        for lengths in ((6, 6, 1), (4, 3, 6), (7, 7, 7, 2), (5, 4, 4, 4, 1)):
            given = inputs(*lengths)
            with torch.no_grad():
                want = model(**given)
            got = run_plainly(rewritten, captures.arguments(program, given), Reference())[0]
            real = given["attention_mask"].bool()
            torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
