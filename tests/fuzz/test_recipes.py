"""Options of any kind: a recipe that survives being written and read, or an ArgumentError that says what is accepted."""

import dataclasses

import fuzz
import random_recipes
from hypothesis import given

from thresher.errors import ArgumentError
from thresher.recipe import CONFIGS, Recipe


@fuzz.chunks
def test_any_options_make_a_recipe_or_an_argument_error(chunk):
    made = {"recipes": 0, "refused": 0}

    @fuzz.examples(400, chunk)
    @given(random_recipes.any_recipe())
    def judge(options):
        try:
            recipe = Recipe.of(options)
        except ArgumentError as refusal:
            assert "accepted is" in str(refusal)
            made["refused"] += 1
            return
        made["recipes"] += 1
        again = Recipe.of(recipe.to_dict())
        assert again == recipe and again.fingerprint() == recipe.fingerprint()

    judge()
    assert min(made.values()) > 20, made


@fuzz.chunks
def test_fitting_options_are_accepted(chunk):
    @fuzz.examples(100, chunk)
    @given(random_recipes.recipes())
    def judge(options):
        recipe = Recipe.of(options)
        assert Recipe.of(recipe.to_dict()) == recipe

    judge()


def test_fitting_options_exist():
    for name, options in random_recipes.FITTING.items():
        assert options.keys() <= {f.name for f in dataclasses.fields(CONFIGS[name])}
