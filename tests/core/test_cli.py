"""The `thresher` command: what each subcommand prints and writes, and the exit codes that CI can use."""

import json
import shutil
from pathlib import Path

import pytest
import zoo
from typer.testing import CliRunner

from thresher import bench, cli, device_rates, devices, models
from thresher.errors import ArgumentError, ThresherError

runner = CliRunner()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Every model name loads a tiny one, with its batch."""
    model, inputs = zoo.ZOO["bert"].build()
    monkeypatch.setattr(models, "load", lambda name: (model, None))
    monkeypatch.setattr(models, "mixed_length_batch", lambda *a, **k: dict(inputs))


def run(*args, code=0):
    result = runner.invoke(cli.app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_doctor_prints_and_calibrates(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    found = json.loads(run("doctor", "--json"))
    rates = next(c for c in found["checks"] if c["name"] == "cost model")
    assert not rates["usable"] and "--calibrate" in rates["fix"]
    monkeypatch.setattr(device_rates, "measure_cpu", lambda: devices.guessed_cpu())
    assert json.loads(run("doctor", "--calibrate", "--json"))["calibrated"].startswith(str(tmp_path))


def test_explain_prints_json_html_and_programs(tmp_path):
    page = tmp_path / "r.html"
    found = json.loads(run("explain", "minilm", "--json", "--html", page))
    assert found["reports"][0]["passes"][0]["rewritten"] == ["the whole program"]
    assert found["reports"][0]["predicted"] > 0
    assert "varlen_attention" in page.read_text()
    text = run("explain", "minilm", "--text")
    assert "prepack" in text and "def program(weights" in text
    assert "no passes" not in run("explain", "minilm", "--recipe", "none")


def test_explain_fails_where_nothing_is_rewritten(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[prepack]\nmask = "nothing_of_that_name"\n')
    assert "nothing_of_that_name" in run("explain", "minilm", "--recipe", recipe, code=1)


def test_compile_writes_an_artifact_whose_certificate_report_reads(tmp_path):
    path = tmp_path / "m.thresher"
    written = json.loads(run("compile", "minilm", path, "--target", "reference", "--json"))
    read = json.loads(run("report", path, "--json"))
    assert read == written["certificate"] and read["target"] == "reference"
    assert "Certificate" in run("report", path)
    shutil.copy(path, tmp_path / "half")
    (tmp_path / "half").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ThresherError, match="truncated"):
        run("report", tmp_path / "half")


def test_bench_times_in_turns_and_fails_below_the_least(tmp_path):
    found = json.loads(run("bench", "minilm", "--target", "reference", "--rounds", 2, "--json"))
    assert [r["name"] for r in found["rows"]] == ["eager", "exact"]
    assert all(r["seconds"] > 0 for r in found["rows"]) and found["rows"][1]["difference"] < 1e-5
    assert found["rows"][1]["expected"] > 1
    run("bench", "minilm", "--target", "reference", "--rounds", 1, "--least", 1e9, code=1)


def test_bench_writes_the_measurement_into_the_certificate():
    model, inputs = zoo.ZOO["bert"].build()
    timed, made = bench.compare(model, inputs, {"mine": "exact"}, target="reference", rounds=1)
    assert made["mine"].certificate.measured == pytest.approx(timed[0].seconds / timed[1].seconds)
    assert "was measured" in str(made["mine"].report)
    with pytest.raises(ArgumentError, match="recipes"):
        bench.compare(model, inputs, {})


def test_calibrate_writes_what_a_recipe_needs(tmp_path):
    path, recipe = tmp_path / "s.safetensors", tmp_path / "r.toml"
    recipe.write_text('[nvfp4]\nmin_weights = 0\nactivations = "nvfp4"\ninput_scale = "calibrated"\n')
    found = json.loads(run("calibrate", "minilm", path, "--recipe", recipe, "--batches", 2, "--json"))
    assert path.is_file() and found["sites"]["nvfp4"] > 0
    explained = json.loads(run("explain", "minilm", "--recipe", recipe, "--stats", path, "--json"))
    assert explained["reports"][0]["passes"][0]["rewritten"]


def test_wrong_words_are_a_message_and_code_2(monkeypatch, capsys):
    for words, said in ((["explain", "minilm", "--recipe", "exakt"], "Did you mean 'exact'"),
                        (["report", "no/such/file"], "cannot be opened")):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["thresher", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_the_page_names_every_command():
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert len(names) == 8 and all(f"`thresher {name}" in page for name in names)
