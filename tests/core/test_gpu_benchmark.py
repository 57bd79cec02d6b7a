"""`benchmarks/gpu.py --dry` walks every row on a CPU, under Triton's interpreter, and writes as it goes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def dry(path, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--dry", "--json", str(path), *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)


@pytest.fixture(scope="module")
def names():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import _gpu_rows

        yield {row.name: row for row in _gpu_rows.ROWS}
    finally:
        sys.path.remove(str(SCRIPT.parent))


# The others go through the same code with other sizes, or compile further models.
SOME = {
    "1 row": "products, 1 row",
    "varlen": "varlen attention",
    "deft": "deft",
    "kv": "kv attention",
    "generate": "generate, 1B",
}


@pytest.mark.slow
@pytest.mark.parametrize("only", ["some", pytest.param("all", marks=pytest.mark.thorough)])
def test_every_row_is_walked(names, tmp_path, only):
    if only == "some":
        names = {name: names[name] for name in SOME.values()}
    done = dry(tmp_path / "gpu.json", *(["--only", ",".join(SOME)] if only == "some" else []))
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    record = json.loads((tmp_path / "gpu.json").read_text())
    rows = record["rows"]
    assert [r["row"] for r in rows if set(r) == {"row", "seconds"}] == list(names)  # each, in this order
    assert rows[0]["row"] == "card" and rows[0]["bandwidth_gb_s"] > 0 and rows[0]["tflop_s"] > 0
    for row in rows:
        assert "failed" not in row
        assert row.get("error", 0) < 2e-3, row
    claimed = {f"{name}: {figure}, geometric mean" for name, row in names.items() for figure, _ in row.claims}
    assert {m["claim"] for m in record["not_measured"]} == claimed and not record["claims"]


def test_the_rows_fit_into_seven_minutes(names):
    assert sum(row.needs for row in names.values()) <= 7 * 60 + 30
    order = list(names)
    assert order.index("products, 1 row") < order.index("generate, 1B")


@pytest.mark.slow
def test_a_row_that_fails_or_hangs_loses_no_other(names, tmp_path):
    """What was found before stands in the file, and the exit status tells."""
    code = f'''
import sys, time
sys.argv = ["gpu.py", "--dry", "--json", r"{tmp_path / "gpu.json"}", "--minutes", "0.01"]
sys.path.insert(0, r"{SCRIPT.parent}")
import gpu
def fails(card):
    yield {{"figure": 1.0}}
    raise ValueError("as it should")
def hangs(card):
    yield {{"figure": 2.0}}
    time.sleep(60)
gpu.GRACE = 2.0
gpu.ROWS = (gpu.Row("first", 1, fails, (("figure", ">= 1"),)), gpu.Row("second", 1, hangs))
sys.exit(gpu.main())
'''
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3, done.stderr[-2000:]
    record = json.loads((tmp_path / "gpu.json").read_text())
    figures = [r["figure"] for r in record["rows"] if "figure" in r]
    assert figures == [1.0, 2.0]
    assert any("as it should" in r.get("failed", "") for r in record["rows"])
    assert any("longer than the time" in m["reason"] for m in record["not_measured"])


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and "--dry" in done.stderr
