"""Recipes are values: from presets, keywords, dicts and files, with an answer to every wrong word."""

import subprocess
import sys
from pathlib import Path

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
        ({"recipe": "nvfp4"}, "nvfp4=True"),
        ({"recipe": "auto"}, "find_recipe"),
        (
            {"nvfp4": {"min_weights": "many"}},
            "nvfp4 option min_weights: got 'many', which is str; accepted is a whole",
        ),
        ({"nvfp4": {"min_weights": True}}, "a whole number"),
        ({"nvfp4": {"min_weights": 1e6}}, "a whole number"),
        ({"nvfp4": {"budget": "0.5"}}, "a number"),
        ({"nvfp4": {"keep": "head"}}, "a list, each of it text"),
        ({"prepack": {"form": 3}}, "text in quotes"),
        ({"rsq": {"rotate": "no"}}, "true or false"),
        ({"transprune": {"stages": [[2]]}}, "a list of 2: a whole number, a number"),
        ({"transprune": {"image_span": [1, 2, 3]}}, "a list of 2"),
        ({"verify": "no"}, "option verify: got 'no'"),
        ({"fuel": None}, "a whole number"),
        ({"min_gain": "0.9"}, "a number"),
        ({"require": 3}, "Write require={...} or [require]"),
        ({"require": {"prepack": "all"}}, "option require"),
        ({"stats": 3}, "text in quotes"),
        ({"prepack": None}, "True, False or a dict"),
        ({"prepack": {"min_share": -0.5}}, "prepack option min_share: got -0.5; accepted is 0 to 1"),
        ({"prepack": {"min_gain": float("nan")}}, "0 or more"),
        ({"nvfp4": {"min_weights": -1}}, "0 or more"),
        ({"bf16": {"budget": -0.1}}, "0 or more"),
        ({"deft": {"min_bytes": -1}}, "0 or more"),
        ({"rsq": {"power": -1.0}}, "0 or more"),
        ({"transprune": {"min_saving": 1.1}}, "-inf to 1"),
        ({"zipvl": {"min_saving": 2.0}}, "-inf to 1"),
        ({"inductor": {"max_autotun": True}}, "Did you mean 'max_autotune'"),
    ],
)
def test_a_wrong_word_is_named_with_what_was_meant(given, said):
    with pytest.raises(ArgumentError) as raised:
        Recipe.of(given)
    assert said in str(raised.value) and raised.value.argument


def test_a_broken_file_says_where(tmp_path):
    path = tmp_path / "r.toml"
    for broken in (b"prepack = [", b"\xff\xfe"):
        path.write_bytes(broken)
        with pytest.raises(ArgumentError, match="valid TOML"):
            Recipe.of(path)
    path.write_text(f'recipe = "{path}"')
    with pytest.raises(ArgumentError, match="its own base"):
        Recipe.of(path)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ArgumentError, match="Is a directory"):
        Recipe.of(tmp_path / "folder.toml")


def test_paths_in_a_file_are_seen_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "base.toml").write_text('recipe = "none"\nstats = "s.safetensors"\n[rsq]\n')
    (tmp_path / "mine.toml").write_text('recipe = "kept/base.toml"\nfreshness = "trust"\n')
    recipe = Recipe.of(tmp_path / "mine.toml")
    assert recipe.stats == str(tmp_path / "kept" / "s.safetensors") and recipe.freshness == "trust"
    monkeypatch.chdir(tmp_path)
    assert Recipe.of("mine.toml").stats == "kept/s.safetensors"
    here = Recipe.of(rsq=True, stats="s.safetensors")
    assert 'stats = "../s.safetensors"' in here.to_toml("kept")
    (tmp_path / "kept" / "written.toml").write_text(here.to_toml("kept"))
    assert Recipe.of("kept/written.toml") == here


def test_values_of_a_kind_with_the_declared_one_are_taken():
    given = {"nvfp4": {"budget": 1, "keep": ["head", "first:2"]}, "stats": Path("s.safetensors"),
             "transprune": {"stages": [[2, 1], [3, 0.5]], "image_span": [1, 5]}}  # fmt: skip
    recipe = Recipe.of(given)
    assert recipe.config("transprune").stages == ((2, 1), (3, 0.5)) and recipe.stats == "s.safetensors"
    assert hash(recipe) == hash(Recipe.of(recipe.to_dict()))


def test_an_error_in_a_file_says_the_file_and_the_line(tmp_path):
    path, other = tmp_path / "r.toml", tmp_path / "other.toml"
    for text, place in (
        ("verify = true\n\n[prepack]\nmin_share = -1.0\n", "r.toml, line 4: prepack option min_share"),
        ("[nvfp4]\nbudget = 0.5\n[deft]\nbudget = 3.0\n", "r.toml, line 4: deft"),
        ("[prepack]\n[nvfp4]\nmin_wei = 1\n", "r.toml, line 3: nvfp4 option"),
        ("freshness = 'chek'\n", "r.toml, line 1: freshness"),
        ("[prepak]\n", "r.toml, line 1: options"),
        ("verify = true\n[require]\nprepack = 50\n", "r.toml, line 3: require"),
        ("[inductor]\nmax_autotun = true\n", "r.toml, line 2: inductor"),
    ):
        path.write_text(text)
        for spec in (path, {"recipe": str(path)}):
            with pytest.raises(ArgumentError) as raised:
                Recipe.of(spec)
            assert place in str(raised.value)
        other.write_text('recipe = "r.toml"\n')
        with pytest.raises(ArgumentError) as raised:
            Recipe.of(other, verify=False)
        assert place in str(raised.value) and "other.toml" not in str(raised.value)
    path.write_text("prepack = true\n")
    with pytest.raises(ArgumentError, match=r"^freshness: "):  # what the caller adds is not the file's
        Recipe.of(path, freshness="chek")


def test_recipes_that_mean_the_same_are_equal_and_hash_alike():
    pairs = [
        ({"prepack": True, "deft": True}, {"deft": True, "prepack": True}),
        ({"nvfp4": {"budget": 1}}, {"nvfp4": {"budget": 1.0}}),
        ({"prepack": True, "require": {"prepack": 1}}, {"require": {"prepack": 1.0}, "prepack": {}}),
        ({"inductor": {"max_autotune": True, "freezing": False}}, {"inductor": {"freezing": False, "max_autotune": True}}),
    ]  # fmt: skip
    for a, b in pairs:
        a, b = Recipe.of(a), Recipe.of(b)
        assert a == b and hash(a) == hash(b) and a.fingerprint() == b.fingerprint()
    assert Recipe(a.passes[::-1], require=a.require) == Recipe(a.passes, require=a.require)


def test_a_recipe_can_be_made_first_thing():
    for code in (
        "thresher.Recipe.of(prepack=True, require={'prepack': 1.0})",
        "thresher.optimize('embed')",
    ):
        subprocess.run([sys.executable, "-c", f"import thresher; {code}"], check=True)


def test_a_recipe_without_passes_stays_one():
    empty = Recipe.of({"prepack": False})
    assert Recipe.of(empty.to_dict()) == empty == Recipe.of("none")
    assert Recipe.of(Recipe.of("none"), freshness="trust").passes == ()


@pytest.mark.parametrize("stages", [None, 3, [3], ["ab"], [[2, 0.5, 1]], [["2", 0.5]], {"2": 0.5}])
def test_stages_of_another_kind_are_refused_by_name(stages):
    with pytest.raises(ArgumentError, match="stages"):
        Recipe.of(transprune={"stages": stages})
