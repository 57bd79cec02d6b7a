"""recipe="auto": the fastest recipe within the budget, resumable, written out; presets and TOML examples load."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import zoo

import thresher
from thresher import backend
from thresher.errors import ArgumentError
from thresher.recipe import PRESETS, Recipe
from thresher.tools import auto, bench

assert backend
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "recipes"
compile_now = auto.compile_strictly
RECIPES = {
    "none": "none",
    "exact": "exact",
    "coarse": {"prepack": True, "nvfp4": {"min_weights": 0, "budget": 1.0}},
    "no such site": {"prepack": {"mask": "other"}},
}


@functools.cache
def built():
    return zoo.ZOO["llama"].build()


@pytest.fixture
def model():
    return built()


@functools.cache
def once(network, recipe):
    return compile_now(network, built()[1], recipe, target="reference", may_do_nothing=True)


def compiled(network, inputs, recipe, target, may_do_nothing):
    assert inputs is built()[1] and target == "reference" and may_do_nothing
    return once(network, recipe)


@pytest.fixture
def timings(monkeypatch):
    """Recipes that take fixed times, and how often each was timed. Each is compiled once for all tests."""
    asked = []
    monkeypatch.setattr(auto, "compile_strictly", compiled)

    def fixed(model, inputs, recipe, target, rounds):
        asked.append(recipe)
        return 3.0 if recipe.config("nvfp4") else 1.5 if recipe.passes else 1.0

    monkeypatch.setattr(auto, "_time", fixed)
    return asked


def find(model, **options):
    network, inputs = model
    return thresher.find_recipe(network, inputs, recipes=RECIPES, target="reference", **options)


def test_the_fastest_within_the_budget_wins_and_says_why_the_others_did_not(model, timings, tmp_path):
    found = find(model, budget=1e-3, output=tmp_path / "r.toml")
    assert found.name == "exact" and found.gain == 1.5 and abs(found.loss) < 1e-6
    rows = {r.name: r for r in found.rows}
    assert "above the budget" in rows["coarse"].reason and rows["coarse"].gain is None
    assert "rewrites nothing" in rows["no such site"].reason
    assert Recipe.of(tmp_path / "r.toml") == Recipe.of("exact")
    assert "above the budget" in str(found)
    assert find(model, budget=1e3).name == "coarse"


def test_an_interrupted_search_goes_on(model, timings, tmp_path, monkeypatch):
    state, judged = tmp_path / "s.json", []
    real = auto._judge

    def judge(network, inputs, name, recipe, metric):
        judged.append(name)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return real(network, inputs, name, recipe, metric)

    monkeypatch.setattr(auto, "_judge", judge)
    with pytest.raises(KeyboardInterrupt):
        find(model, budget=1e-3, state=state)
    assert len(json.loads(state.read_text())["rows"]) == 2
    found = find(model, budget=1e-3, state=state)
    assert judged == ["none", "exact", "coarse", "coarse", "no such site"] and found.name == "exact"
    assert len(timings) == 2  # none and exact once each


def test_recipes_that_make_the_same_program_are_timed_once(model, timings):
    network, inputs = model
    recipes = {"exact": "exact", "with deft": {"recipe": "exact", "deft": True}, "buckets": {"prepack": {"buckets": 4}},
               "other buckets": {"prepack": {"buckets": 8}}}  # fmt: skip
    found = thresher.find_recipe(network, inputs, budget=1e-3, recipes=recipes, target="reference")
    rows = {r.name: r for r in found.rows}
    assert rows["with deft"].like == "exact" and rows["with deft"].gain == rows["exact"].gain
    assert len({r.program for r in found.rows}) == len(timings) == 3
    assert "(the same program as exact)" in str(found)


def test_a_larger_budget_times_what_the_smaller_one_left_out(model, timings, tmp_path):
    state = tmp_path / "s.json"
    find(model, budget=1e-3, state=state)
    assert find(model, budget=1e3, state=state).name == "coarse"


def test_another_model_starts_anew(model, timings, tmp_path):
    state = tmp_path / "s.json"
    find(model, budget=1e-3, state=state)
    network, inputs = copy.deepcopy(model[0]), model[1]
    with torch.no_grad():
        network.lm_head.weight.mul_(1.5)
    before = len(timings)
    find((network, inputs), budget=1e-3, state=state)
    assert len(timings) > before
    state.write_text("{}")
    with pytest.raises(ArgumentError, match="state"):
        find(model, state=state)


@pytest.mark.parametrize(
    "wrong",
    [{"gain": "x"}, {"gain": -1.0}, {"gain": float("nan")}, {"loss": 10**400}, {"loss": True}, {"name": 1},
     {"reason": 0}, {"fingerprint": "other"}, {"unknown": 1}],
    ids=str,
)  # fmt: skip
def test_a_state_file_whose_rows_no_search_wrote_is_refused(wrong, tmp_path):
    state = tmp_path / "s.json"
    auto._State(state, "key").add(auto.Tried("a", "0123", 0.5, float("inf"), 1.0))
    assert auto._State(state, "key").rows["0123"].loss == 0.5
    kept = json.loads(state.read_text())
    kept["rows"]["0123"].update(wrong)
    state.write_text(json.dumps(kept))
    with pytest.raises(ArgumentError, match=r"s\.json"):
        auto._State(state, "key")


@pytest.mark.parametrize("metric", ["kl", "perplexity", "cosine", None])
def test_metrics_are_zero_for_the_model_itself_and_not_for_another(model, metric):
    network, inputs = model
    loss = auto._metric(metric, network, inputs)
    assert abs(loss(network)) < 1e-5
    other, _ = zoo.ZOO["llama"].build()
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight))
        other.model.norm.weight.mul_(-1)
    assert abs(loss(other)) > 1e-2


def test_a_metric_of_the_users_own(model, timings):
    network, inputs = model

    def agreement(call):
        """Share of next tokens that are the model's own."""
        with torch.no_grad():
            same = bench.first_tensor(call(**inputs)).argmax(-1) == bench.first_tensor(
                network(**inputs)
            ).argmax(-1)
        return float(same[inputs["attention_mask"].bool()].float().mean())

    found = find(model, budget=0.0, metric=agreement)
    assert found.name == "exact" and found.loss == 0.0


def test_compile_takes_auto(model, monkeypatch):
    network, inputs = model
    asked = {}

    @functools.wraps(auto.find_recipe)
    def fake(model, example, **options):
        asked.update(options)
        return auto.Candidate(Recipe.of("exact"), "exact", 2.0, 0.0)

    monkeypatch.setattr(auto, "find_recipe", fake)
    compiled = thresher.compile(network, inputs, "auto", target="reference", search={"budget": 0.02})
    assert compiled.recipe == Recipe.of("exact") and asked == {"target": "reference", "budget": 0.02}
    with pytest.raises(ArgumentError, match="search="):
        thresher.compile(network, inputs, "auto", prepack=True)
    with pytest.raises(ArgumentError, match="Did you mean 'budget'"):
        thresher.compile(network, inputs, "auto", search={"buget": 0.02})


def test_what_cannot_be_used_is_said_before_the_search(model, tmp_path, monkeypatch):
    network, inputs = model
    monkeypatch.setattr(auto, "_metric", lambda *_: pytest.fail("the model was run first"))
    (tmp_path / "file").touch()
    for given, said in (({"output": tmp_path / "file" / "x.toml"}, "output"), ({"state": tmp_path}, "state"),
                        ({"budget": "small"}, "a number"), ({"recipes": {}}, "at least one")):  # fmt: skip
        with pytest.raises(ArgumentError, match=said):
            auto.find_recipe(network, inputs, **given)


def test_wrong_words(model):
    with pytest.raises(ArgumentError, match="Did you mean 'perplexity'"):
        find(model, metric="perplexiti")
    with pytest.raises(ArgumentError, match="budget"):
        find(model, budget=-1)
    encoder = zoo.ZOO["bert"].build()
    with pytest.raises(ArgumentError, match="without logits"):
        find(encoder, metric="kl")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe_that_survives_toml(name, tmp_path):
    recipe = Recipe.of(name)
    path = tmp_path / "r.toml"
    path.write_text(dataclasses.replace(recipe, require=(), freshness="trust").to_toml())
    assert Recipe.of(path) == dataclasses.replace(recipe, freshness="trust")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_example_recipe_loads(path):
    assert Recipe.of(path).passes
