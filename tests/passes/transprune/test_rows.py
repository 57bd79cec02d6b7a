"""Budgets by row and by image: a row of a batch keeps what it keeps alone, whatever stands beside it."""

import pytest
import torch
from pruned import pruned
from tiny_llama import IMAGE, TOKENS, make, prompt

from thresher import given_tokens
from thresher.passes.transprune.rows import choose, going, ranks_in_runs, runs
from thresher.recipe import Recipe

OPTIONS = dict(
    min_image_tokens=2, bucket=1, min_saving=0.0, image_token_id=IMAGE, stages=((1, 0.5), (2, 0.25))
)


@pytest.fixture(scope="module")
def model():
    return make()


def batch(side: str | None) -> dict[str, torch.Tensor]:
    """Rows of 48 and 40 tokens, of which 32 and 12 are an image's; without a side, of 48 both."""
    ids = prompt(2)
    ids[1, 16:] = prompt(1, TOKENS - 16, seed=3, span=None)
    if side is None:
        return dict(input_ids=ids)
    mask = torch.ones_like(ids)
    pads = slice(0, 8) if side == "left" else slice(40, 48)
    if side == "left":
        ids[1, 8:] = ids[1, :40].clone()
    ids[1, pads], mask[1, pads] = 0, 0
    return dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))


def run(model, inputs, **options):
    return pruned(model, inputs, {**OPTIONS, **options})


@pytest.mark.parametrize(
    "policy, side",
    [
        ("transprune", "left"),
        ("fastv", None),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (("transprune", "right"), ("transprune", None), ("fastv", "left"), ("fastv", "right"))
        ),
    ],
)
@torch.no_grad()
def test_each_row_is_pruned_as_alone(model, policy, side):
    """Left over places are hidden by the mask, or by causality where there is none, in scores too."""
    inputs = batch(side)
    together, extras = run(model, inputs, policy=policy, instruction=4)
    for row, (tokens, images) in enumerate(((48, 32), (40 if side else 48, 12))):
        real = inputs["attention_mask"][row].bool() if side else torch.ones(48, dtype=torch.bool)
        alone, _ = run(
            model, dict(input_ids=inputs["input_ids"][row : row + 1, real]), policy=policy, instruction=4
        )
        torch.testing.assert_close(together[row : row + 1, real], alone, rtol=1e-4, atol=1e-4)
        for stage, keep in (("kept.1", 0.5), ("kept.2", 0.25)):
            at = extras[stage][row]
            held = at[at >= 0]
            assert real[held].all() and len(held) == tokens - images + keep * images
            assert (at[len(held) :] == -1).all() and torch.equal(held, held.sort().values)


@torch.no_grad()
def test_spare_places_are_hidden_when_states_are_passed_through(model):
    inputs = batch("left")
    options = dict(policy="uniform", restore="passthrough")
    together, _ = run(model, inputs, **options)
    alone, _ = run(model, dict(input_ids=inputs["input_ids"][1:, 8:]), **options)
    torch.testing.assert_close(together[1:, 8:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_image_keeps_its_share(model):
    """All high scores in the second image; the first keeps its part all the same, in both stages."""
    ids = prompt(1, span=None)
    ids[:, 4:14] = ids[:, 20:40] = IMAGE
    scores = torch.arange(TOKENS).float()[None]
    found = {}
    with given_tokens.token_types((ids == IMAGE).long(), scores):
        for per_image in (False, True):
            _, extras = run(model, dict(input_ids=ids), policy="given", per_image=per_image)
            found[per_image] = [
                [int(((at >= a) & (at < b)).sum()) for a, b in ((4, 14), (20, 40))]
                for at in (extras["kept.1"], extras["kept.2"])
            ]
    assert found[False] == [[0, 15], [0, 8]]
    assert found[True] == [[5, 10], [3, 5]]


def test_a_share_is_of_the_rows_own_image_tokens():
    config = Recipe.of(None, transprune=dict(min_image_tokens=8, bucket=4)).passes[0]
    assert [going(config, 0.5, n) for n in (7, 8, 30)] == [0, 4, 12]
    assert going(config, 0.5, 30, [10, 5, 15]) == 5 + 2 + 7
    assert going(config, 0.01, 9, [1, 8]) == 0 + 7


def test_ranks_within_images_and_places_left_over():
    image = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    score = torch.tensor([[9.0, 1, 2, 9, 5, torch.nan, 7, 9]])
    run = runs(image)
    assert ranks_in_runs(score, image, run)[image].tolist() == [1, 0, 1, 2, 0]
    index, real = choose(score, ~image, None, torch.tensor([4]), 6)
    assert index[0, real[0]].tolist() == [0, 3, 6, 7] and real[0].tolist() == [True] * 4 + [False] * 2
    assert len(set(index[0].tolist())) == 6
