"""The benchmarks' helper: fair timing, honest claims, a record that any JSON reader takes."""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

_PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "_harness.py"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("_harness", _PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_harness"] = module  # dataclasses look their module up by name
    sys.path.append(str(_PATH.parent))  # where its own helpers stand
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(_PATH.parent))
    del sys.modules["_harness"]


def test_a_record_keeps_no_place_on_a_machine(bench):
    bench.not_measured("a", "ImportError: no x (/home/me/lib/x.py), nor /opt/y; see https://example.org/a/b.")
    assert bench.missing[-1]["reason"] == "ImportError: no x (x.py), nor y; see https://example.org/a/b."


@pytest.fixture
def bench(harness, tmp_path):
    return harness.Benchmark("sample", argparse.Namespace(quick=True, json=tmp_path / "out" / "record.json"))


def busy(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_timing_tells_cpu_from_waiting(harness):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = harness.interleave(
            {"busy": lambda: busy(0.02), "asleep": lambda: time.sleep(0.02)}, rounds=3, warmup=1, least_ms=1
        )
    finally:
        torch.set_num_threads(before)
    assert times["busy"].cpu_min >= 19 > 10 > times["asleep"].cpu_median
    assert times["asleep"].wall_min >= 19
    assert (
        times["busy"].cpu_min <= times["busy"].cpu_median
        and times["busy"].wall_min >= times["busy"].cpu_min - 1
    )


def test_forms_take_turns_and_quick_ones_are_repeated(harness):
    order = []
    forms = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.003))}
    times = harness.interleave(forms, rounds=2, warmup=1, least_ms=2)
    rounds = order[2:]
    assert times["a"].calls > 1 and times["b"].calls == 1
    turns = [name for i, name in enumerate(rounds) if i == 0 or rounds[i - 1] != name]
    assert turns == ["a", "b", "a"], "the second round starts with the other form"


@pytest.mark.parametrize(
    "value, target, holds",
    [
        (0.9, ">= 0.90", True),
        (0.89, ">= 0.90", False),
        (1e-6, "<= 1e-5", True),
        (0, "== 0", True),
        (3, "< 3", False),
    ],
)
def test_claims(bench, value, target, holds):
    assert bench.claim("it works", value, target) is holds
    assert bench.claims == [{"claim": "it works", "value": value, "target": target, "holds": holds}]


def test_nan_holds_no_claim_and_a_bad_target_is_refused(bench):
    assert not bench.claim("broken", float("nan"), ">= 0")
    assert not bench.claim("broken", float("nan"), "<= 0")
    with pytest.raises(ValueError, match="target: got 'about 3'"):
        bench.claim("vague", 3.0, "about 3")


def test_record_and_tables(bench, capsys):
    bench.row(form="padded", cpu_min_ms=2.0)
    bench.row(form="ours", cpu_min_ms=1.0, speedup=float("inf"))
    bench.claim("speed-up", 2.0, ">= 1.5")
    bench.not_measured("speed-up on a GPU", "This machine has no GPU.")
    bench.finish()
    record = json.loads(bench.args.json.read_text(), parse_constant=pytest.fail)
    assert record["rows"][1] == {"form": "ours", "cpu_min_ms": 1.0, "speedup": "inf"}
    assert record["claims"][0]["holds"] is True
    assert record["not_measured"] == [{"claim": "speed-up on a GPU", "reason": "This machine has no GPU."}]
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "speed-up on a GPU" in printed and "not measured" in printed and "padded" in printed
