"""What else is asked of `generate`, class by class and recipe by recipe: right, or refused before the first token."""

import json
import runpy
from pathlib import Path

import pytest
import vlm_features
import vlm_zoo

ROOT = Path(__file__).resolve().parents[2]
EACH = {"LLaVA": ("returned", "right", "turn")}  # in a plain run, of token pruning


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EACH)
def test_a_sample_of_them_is_right(name):
    made = vlm_features.Features(name, "transprune")
    assert {feature: made.cell(feature) for feature in EACH[name]} == dict.fromkeys(EACH[name], "equal")


@pytest.mark.filterwarnings("ignore")
def test_drafts_behind_a_prompt_do_not_decide_which_of_its_tokens_stay():
    """transformers runs the first drafts with the prompt; zipvl, which scores by the last ones, took them for text."""
    assert vlm_features.Features("LLaVA-OneVision", "zipvl").cell("assistant") == "equal"


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", vlm_features.RECIPES)
@pytest.mark.parametrize("name", vlm_zoo.ZOO)
def test_each_is_right_or_refused(name, recipe):
    made = vlm_features.Features(name, recipe)
    found = {feature: made.cell(feature) for feature in vlm_features.COLUMNS}
    assert {feature: said for feature, said in found.items() if not vlm_features.holds(said)} == {}


def test_the_page_shows_the_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks" / "vlm_modes.py"))
    rows = json.loads(script["RECORD"].read_text())["rows"]
    assert script["table"](rows) in script["PAGE"].read_text()
