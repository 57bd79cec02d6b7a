"""A question between the marks of a chat template: its tokens ask, and the template's own do not."""

import pytest
import torch
from pruned import pruned
from tiny_llama import make, prompt

from thresher import given_tokens, prompt_tokens
from thresher.errors import ArgumentError
from thresher.recipe import Recipe

BEGIN, END = (3, 4), (5,)
OPTIONS = dict(min_image_tokens=2, bucket=1, min_saving=0.0, image_span=(3, 35), stages=((1, 0.5),))
WORDS = 6


@pytest.fixture(scope="module")
def model():
    return make(num_hidden_layers=2)


TAIL = (5, 9, 3, 10, 70, 33, 52, 81, 20, 64, 47, 15)


def marked(tail: tuple[int, ...] = TAIL) -> torch.Tensor:
    """BEGIN, an image of 32 tokens, a question of WORDS and what a template writes behind it."""
    image, words = (prompt(1, n, seed=n, span=None).clamp_min(11) for n in (32, WORDS))
    ids = torch.cat([torch.tensor([[7, *BEGIN]]), image, words], 1)
    return torch.cat([ids, torch.tensor([tail], dtype=torch.long)], 1)


def kept(model, ids, **options):
    named = dict(input_ids=ids)
    recipe = Recipe.of(None, transprune={**OPTIONS, **options})
    with given_tokens.read_from_ids(None, prompt_tokens.question(recipe, named)):
        return pruned(model, named, {**OPTIONS, **options})[1]["kept.1"]


@torch.no_grad()
def test_the_last_user_turn_asks(model):
    """As if the prompt ended where the question does."""
    ids, bare = marked(), marked(())
    whole = kept(model, ids)
    actual = kept(model, ids, user_turn=(BEGIN, END))
    expected = kept(model, bare, instruction=WORDS)
    length = bare.shape[1]
    assert torch.equal(actual[actual < length], expected[0])
    assert not torch.equal(actual, whole)


@torch.no_grad()
def test_where_no_marks_stand_or_the_question_stands_before_the_image_all_text_behind_asks(model):
    ids = marked()
    plain, last = ids.where(ids != BEGIN[0], 9), dict(image_span=(10, ids.shape[1]))
    for given, options in ((plain, {}), (ids, last)):
        actual = kept(model, given, user_turn=(BEGIN, END), **options)
        assert torch.equal(actual, kept(model, given, **options))


def test_turns_are_found_in_each_row():
    ids = torch.tensor(
        [[3, 4, 8, 5, 3, 4, 9, 9, 5, 1], [0, 0, 3, 4, 8, 8, 8, 8, 8, 8], [3, 9, 4, 5, 5, 3, 4, 5, 4, 3]]
    )
    found = prompt_tokens.last_turn(ids, BEGIN, END)
    assert [row.nonzero().flatten().tolist() for row in found] == [[6, 7], [4, 5, 6, 7, 8, 9], []]
    assert not prompt_tokens.last_turn(ids[:, :1], BEGIN, END).any()
    assert prompt_tokens.last_turn(ids, BEGIN, ())[0].sum() == 4
    recipe = Recipe.of(None, transprune={"user_turn": (BEGIN, END)})
    assert prompt_tokens.question(recipe, dict(inputs_embeds=torch.zeros(2, 5, 4))).shape == (2, 5)
    assert prompt_tokens.question(recipe, dict(input_ids=ids[:, :1])) is None
    assert prompt_tokens.question(Recipe.of(None, transprune={}), dict(input_ids=ids)) is None


@pytest.mark.parametrize("given", [((),), ((), (1,)), ((1,), (2,), (3,))])
def test_marks_that_are_none_are_refused(given):
    with pytest.raises(ArgumentError, match="user_turn"):
        Recipe.of(None, transprune={"user_turn": given})


def test_without_ids_at_hand_nothing_is_pruned_and_why_is_said(model):
    with pytest.raises(AssertionError, match="looked for in each call's input_ids"):
        pruned(model, dict(input_ids=marked()), {**OPTIONS, "user_turn": (BEGIN, END)})
