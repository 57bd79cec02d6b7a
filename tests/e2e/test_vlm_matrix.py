"""A sample of the table of models in docs/tokens.md, and that the table is the record's."""

import importlib.util
import json
from pathlib import Path

import pytest
import vlm_zoo
from vlm_cases import Case

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("vlm_matrix", ROOT / "benchmarks" / "vlm_matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("LLaVA", ("cut", "rows")),
        pytest.param("LLaVA", ("whole", "turn", "text", "half"), marks=pytest.mark.thorough),
        pytest.param(
            "Qwen3-VL", ("whole", "cut", "rows", "turn"), marks=pytest.mark.thorough
        ),  # features behind layers
        pytest.param("SmolVLM", ("rows", "zipvl"), marks=pytest.mark.thorough),  # two graphs
        pytest.param("Qwen3-VL-MoE", ("cut", "rows"), marks=pytest.mark.thorough),  # experts, one row and two
        pytest.param("Gemma 3", ("whole", "cut", "rows"), marks=pytest.mark.thorough),  # windows
        pytest.param("Qwen2-Audio", ("cut", "rows"), marks=pytest.mark.thorough),
    ],
)
def test_a_model_is_right_in_every_column(name, columns):
    case = Case(name)
    assert {column: getattr(case, column)() for column in columns} == dict.fromkeys(columns, "equal")


def test_a_row_alone_holds_its_own_images():
    """What the comparison of a batch with its rows stands on."""
    for name in ("LLaVA", "Qwen2-VL", "SmolVLM", "Qwen2-Audio"):  # by image, by patch, by row, by sound
        model = vlm_zoo.build(name)
        whole = vlm_zoo.batch(name, model, (1, 2))
        for index, images in enumerate((1, 2)):
            alone = vlm_zoo.row(whole, (1, 2), index)
            assert bool(alone["attention_mask"].all()) and len(alone["input_ids"]) == 1
            marks = int((alone["input_ids"] == vlm_zoo.ZOO[name].mark).sum())
            assert marks * 3 == int((whole["input_ids"] == vlm_zoo.ZOO[name].mark).sum()) * images


def test_the_page_shows_the_record(script):
    rows = json.loads(script.RECORD.read_text())["rows"]
    assert {row["model"] for row in rows} <= set(vlm_zoo.ZOO)
    assert script.table(rows) in script.PAGE.read_text()
