"""The zoo's fixed sample is as its record says: what packs, what does not and why; and the docs show the record."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from sampled import sampled

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import _zoo_run  # noqa: E402
import _zoo_sample  # noqa: E402

_SPEC = importlib.util.spec_from_file_location(
    "zoo_benchmark", BENCHMARKS / "zoo.py"
)  # support has a zoo too
zoo = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(zoo)
sys.path.remove(str(BENCHMARKS))
ROWS = {r["class"]: r for r in json.loads(zoo.RECORD.read_text())["rows"]}


def plain(reason):
    """A reason without the numbers that nodes' names end with."""
    return re.sub(r"_\d+\b", "", reason or "")


# One of each kind of graph; their neighbours run with --thorough.
PLAIN = (
    "Llama4ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "BloomForCausalLM",
    "FalconForCausalLM", "Gemma3ForConditionalGeneration", "WhisperForConditionalGeneration", "GptOssForCausalLM",
    "Qwen3NextForCausalLM", "BertModel", "ModernBertModel", "DebertaV2Model", "XLNetModel", "EsmModel",
    "BartForConditionalGeneration", "CLIPModel", "DINOv3ViTModel",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(PLAIN, _zoo_sample.SAMPLE))
def test_a_class_is_as_it_was_recorded(name):
    row, now = ROWS[name], _zoo_run.run(name, ())
    assert now["outcome"] == row["outcome"] == "right", now
    assert now.get("packed") == row.get("packed"), (now, row)
    assert plain(now.get("prepack")) == plain(row.get("prepack"))


def test_the_sample_has_forty_classes_and_no_recorded_class_is_wrong():
    assert len(set(_zoo_sample.SAMPLE)) == 40 and ROWS.keys() >= set(_zoo_sample.SAMPLE)
    assert not [r["class"] for r in ROWS.values() if r["outcome"] in ("crashes", "differs")]
    lost = {r["class"] for r in ROWS.values() if r.get("unaccounted")}
    assert lost == {"PerceiverForMaskedLM"}  # the table of tokens, as docs/structure.md says


def test_the_docs_show_the_record():
    assert zoo.document() == zoo.PAGE.read_text(), "run: python benchmarks/zoo.py --document"


def test_a_row_cut_short_is_run_again(tmp_path):
    state = tmp_path / "rows.jsonl"
    state.write_text('{"class": "A", "outcome": "right"}\n{"class": "B", "outc')
    assert list(zoo.rows_in(state)) == ["A"]
