"""Recipes are values: from presets, keywords, dicts and files, with an answer to every wrong word."""

import pytest

from thresher import backend  # registers the passes
from thresher.errors import ArgumentError
from thresher.recipe import Recipe

assert backend


def test_the_same_recipe_from_every_source(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('freshness = "trust"\n[prepack]\nmin_share = 0.25\n[require]\nprepack = 1.0\n')
    given = {"prepack": {"min_share": 0.25}, "freshness": "trust", "require": {"prepack": 1.0}}
    recipes = [
        Recipe.of(path),
        Recipe.of(str(path)),
        Recipe.of({"recipe": str(path)}),
        Recipe.of(given),
        Recipe.of(**given),
        Recipe.of(Recipe.of(prepack={"min_share": 0.25}), freshness="trust", require={"prepack": 1.0}),
        Recipe.of(Recipe.of(given).to_dict()),
    ]
    assert len(set(recipes)) == 1 and len({r.fingerprint() for r in recipes}) == 1


def test_presets_and_what_comes_on_top():
    exact = Recipe.of(prepack=True, decode_attention=True)
    assert Recipe.of() == Recipe.of("exact") == Recipe.of({"recipe": "exact"}) == exact
    assert Recipe.of("none").passes == ()
    assert Recipe.of("exact", prepack=False, decode_attention=False).passes == ()
    assert Recipe.of("exact").fingerprint() != Recipe.of("none").fingerprint()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prepak": True}, "Did you mean 'prepack'"),
        ({"prepack": {"min_shar": 1}}, "Did you mean 'min_share'"),
        ({"recipe": "exakt"}, "Did you mean 'exact'"),
        ({"freshness": "chek"}, "Did you mean 'check'"),
        ({"require": {"prepakc": 0.5}}, "Did you mean 'prepack'"),
        ({"require": {"prepack": 50}}, "a share from 0 to 1"),
        ({"prepack": 3}, "True, False or a dict"),
        ({"recipe": "no/such/file.toml"}, "existing TOML file"),
    ],
)
def test_a_wrong_word_is_named_with_what_was_meant(given, said):
    with pytest.raises(ArgumentError) as raised:
        Recipe.of(given)
    assert said in str(raised.value) and raised.value.argument


def test_a_broken_file_says_where(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("prepack = [")
    with pytest.raises(ArgumentError, match="valid TOML"):
        Recipe.of(path)
