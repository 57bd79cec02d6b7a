"""What the documents say was measured is what the records hold."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_page_of_results_is_what_the_records_say():
    summary = runpy.run_path(str(ROOT / "benchmarks" / "summary.py"))
    assert (ROOT / "docs" / "results.md").read_text() == summary["page"](), (
        "run: python benchmarks/summary.py"
    )


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_record_says_where_and_with_what_it_was_measured(path):
    record = json.loads(path.read_text())
    assert record["machine"]["cpu"] and record["versions"]["torch"] and record["command"]
    assert record["claims"] and all({"claim", "value", "target", "holds"} <= set(c) for c in record["claims"])
    assert all(entry["reason"].endswith(".") for entry in record["not_measured"])


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_record_names_no_place_on_a_machine(path):
    assert not any(place in path.read_text() for place in ("/home/", "/root/", "/work/", "/tmp/", "C:\\\\"))
