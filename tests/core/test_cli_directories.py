"""The command on a user's own directory and text: heads, encoder-decoders, types, and everything that can be wrong."""

import json

import onnx
import pytest
import tiny_directories
import torch
from safetensors.torch import load_file, save_file

from thresher import cli
from thresher.errors import ArgumentError
from thresher.tools import models, text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories by name, and a file of text."""
    root = tmp_path_factory.mktemp("models")
    made = {"data": root / "texts.txt"}
    made["data"].write_text("\n".join(tiny_directories.TEXTS) + "\n\n")
    for name in ("llama", "classifier", "roberta", "t5"):
        made[name] = tiny_directories.save(getattr(tiny_directories, name)(), root / name)
    return made


@pytest.fixture
def main(monkeypatch, capsys):
    """Exit code, standard output and standard error of the command as a shell runs it."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["thresher", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return run


@pytest.mark.parametrize(
    ("name", "kind", "outputs"),
    [
        ("classifier", "BertForSequenceClassification", {"logits": ["batch", 3]}),
        pytest.param("llama", "LlamaForCausalLM", {"logits": ["batch", "sequence", 64]}, marks=pytest.mark.thorough),
        ("roberta", "RobertaModel", {"last_hidden_state": ["batch", "sequence", 32], "pooler_output": ["batch", 32]}),
    ],
)  # fmt: skip
def test_export_has_the_models_own_head_and_names_its_sizes(folders, main, tmp_path, name, kind, outputs):
    path = tmp_path / "m.onnx"
    assert type(models.load(str(folders[name]))[0]).__name__ == kind
    rows = (
        ["--rows", 1] if name == "classifier" else []
    )  # one row asked for still gives a file for any number
    code, out, said = main("export", folders[name], path, *rows, "--data", folders["data"], "--json")
    assert code == 0, said
    assert all(d["relative"] < 1e-4 for d in json.loads(out)["differences"])
    graph = onnx.load(path).graph
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
             for v in (*graph.input, *graph.output)}  # fmt: skip
    assert sizes["input_ids"] == ["batch", "sequence"]
    assert {n: sizes[n] for n in outputs} == outputs


def test_an_encoder_decoder_is_compiled_saved_and_exported(folders, main, tmp_path):
    model, tokenizer = models.load(str(folders["t5"]))
    batch = text.batch(model, tokenizer, 3, 8, tiny_directories.TEXTS)
    assert batch["decoder_input_ids"][:, 0].eq(0).all() and batch["decoder_attention_mask"].shape == (3, 8)
    path = tmp_path / "t5.onnx"
    code, _, said = main("export", folders["t5"], path, "--data", folders["data"], "--quiet")
    assert code == 0, said
    assert "logits" in {v.name for v in onnx.load(path).graph.output}
    code, _, said = main("compile", folders["t5"], tmp_path / "t5.thr", "--data", folders["data"],
                         "--target", "reference")  # fmt: skip
    assert code == 0, said


def test_bench_and_compile_take_a_users_directory_text_and_type(folders, main, tmp_path):
    code, out, said = main("bench", folders["llama"], "--data", folders["data"], "--rounds", 1, "--target",
                           "reference", "--json")  # fmt: skip
    assert code == 0, said
    assert [r["name"] for r in json.loads(out)["rows"]] == ["eager", "exact"]
    assert "loading the model ..." in said
    path = tmp_path / "m.thr"
    code, _, said = main("compile", folders["llama"], path, "--data", folders["data"], "--dtype", "bfloat16",
                         "--target", "reference", "-q")  # fmt: skip
    assert code == 0 and path.is_file() and not said


def test_quantize_writes_a_directory_that_transformers_loads(folders, main, tmp_path):
    pytest.importorskip("compressed_tensors", reason="plain transformers reads the files by it")
    out = tmp_path / "low"
    code, said, err = main("quantize", folders["llama"], "--bits", 3, "--data", folders["data"], "--out", out,
                           "--length", 8, "--json")  # fmt: skip
    assert code == 0, err
    found = json.loads(said)
    assert found["path"] == str(out) and found["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert "quantizing on" in err and "MB of memory at a time" in err  # before it starts
    code, said, err = main("quantize", folders["llama"], "--bits", 3, "--data", folders["data"], "--out",
                           tmp_path / "dry", "--length", 8, "--dry-run", "--json")  # fmt: skip
    told = json.loads(said)
    assert code == 0 and told["peak"] == sum(told["parts"].values()) and told["seconds"] > 0, err
    assert told["written"] > 0 and not list(tmp_path.glob("dry*"))
    loaded, tokenizer = models.load(str(out))
    with torch.no_grad():
        assert loaded(**tokenizer(["a mill"], return_tensors="pt")).logits.isfinite().all()
    for place in (out, folders["data"]):  # where files are already
        code, said, err = main("quantize", folders["llama"], "--out", place)
        assert code == 2 and "--out: got" in err and "loading" not in err
    for words, name in (
        (("--bits", 5), "bits"),
        (("--group-size", 7), "group_size"),
        (("--grid", "fp5"), "grid"),
    ):
        code, _, err = main("quantize", folders["llama"], "--out", tmp_path / "new", *words)
        assert code == 2 and f"rsq option {name}" in err and "Traceback" not in err


def test_quantize_goes_on_after_an_interruption_and_names_what_is_wrong(folders, main, tmp_path, monkeypatch):
    from thresher.passes.rsq.quantizer import driver

    out, words = tmp_path / "low", ("--data", folders["data"], "--length", 8, "--group-size", 32)
    accept, calls = driver.Driver._save, []

    def save(self, piece):
        calls.append(piece.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        accept(self, piece)

    monkeypatch.setattr(driver.Driver, "_save", save)
    assert main("quantize", folders["llama"], "--out", out, *words)[0] == 130
    layers = tmp_path / "low.layers"
    assert len(list(layers.iterdir())) == 1 and not any(out.glob("*"))
    code, _, said = main("quantize", folders["llama"], "--out", out, *words)
    assert code == 0 and calls[2:] == calls[1:2] and not layers.exists(), said
    broken = tiny_directories.save(tiny_directories.llama(), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    code, _, said = main("quantize", broken, "--out", tmp_path / "new", *words)
    assert code == 2 and "up_proj.weight in " in said and "has 1 NaN or infinite values" in said, said
    gpt2 = tiny_directories.save(tiny_directories.gpt2(), tmp_path / "gpt2")
    code, _, said = main("quantize", gpt2, "--out", tmp_path / "new", *words)
    assert code == 2 and "of which no linear can be quantized and saved" in said and "Conv1D" in said, said


def test_quantize_takes_an_encoder_decoder_in_the_type_of_its_files(folders, main, tmp_path):
    where = tiny_directories.save(tiny_directories.t5().bfloat16(), tmp_path / "t5")
    out = tmp_path / "low"
    code, _, said = main("quantize", where, "--out", out, "--data", folders["data"], "--length", 8)
    assert code == 0, said
    kept = load_file(out / "model.safetensors")
    assert kept["encoder.block.0.layer.0.SelfAttention.q.weight_packed"].dtype == torch.int32
    assert kept["shared.weight"].dtype == torch.bfloat16


def test_rows_fit_the_models_positions(folders):
    long = [" ".join(tiny_directories.TEXTS)] * 2
    for name, fits in (("classifier", 24), ("roberta", 16), ("llama", 64)):
        model, tokenizer = models.load(str(folders[name]))
        batch = text.batch(
            model, tokenizer, 2, 512, long * 1 if name != "llama" else [" ".join(long * 4)] * 2
        )
        assert batch["input_ids"].shape[1] == fits
        with torch.no_grad():
            model(**batch)


def test_a_task_is_the_head_and_one_that_is_not_in_the_files_is_refused(folders):
    assert type(models.load(str(folders["classifier"]), "feature-extraction")[0]).__name__ == "BertModel"
    with pytest.raises(ArgumentError, match=r"--task: got .*lm_head|--task: got .*predictions"):
        models.load(str(folders["classifier"]), "fill-mask")
    with pytest.raises(ArgumentError, match="Did you mean 'fill-mask'"):
        models.load(str(folders["classifier"]), "fill_mask")


def _broken(folders, tmp_path, what):
    """A copy of a directory with one thing wrong."""
    path = tiny_directories.save(tiny_directories.llama(), tmp_path / "model")
    if what == "config":
        (path / "config.json").write_text("{")
    elif what == "weights cut":
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:2000])
    elif what == "no weights":
        (path / "model.safetensors").unlink()
    elif what == "class":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"]}))
    elif what == "kind":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "nobodys"}))
    elif what == "shapes":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    elif what == "tokenizer":
        tiny_directories.tokenizer(pad_token=None, eos_token=None).save_pretrained(path)
        for word in ("pad_token", "eos_token"):
            words = json.loads((path / "tokenizer_config.json").read_text())
            words.pop(word, None)
            (path / "tokenizer_config.json").write_text(json.dumps(words))
    elif what == "vocabulary":
        path = tiny_directories.save(tiny_directories.llama(vocab_size=8), tmp_path / "small")
    return path


@pytest.mark.parametrize(
    "what",
    ["config", "weights cut", "no weights", "class", "kind", "shapes", "tokenizer", "vocabulary"],
)
def test_a_directory_with_something_wrong_is_a_message(folders, main, tmp_path, what):
    code, out, said = main("explain", _broken(folders, tmp_path, what), "--data", folders["data"])
    assert code == 2 and not out and "model: got" in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"\n\n", "holds no text"),
        ("binary.txt", b"\xff\xfe\x00\x01", "no UTF-8"),
        ("lines.jsonl", b'{"text": "a mill"}\n{"text": \n', "line 2"),
        ("lines.jsonl", b'{"words": "a mill"}\n', "no text"),
        ("list.json", b'{"text": "a mill"}', "a list of texts"),
        (None, b"", "No such file"),
    ],
)
def test_text_with_something_wrong_is_a_message(folders, main, tmp_path, name, content, said):
    path = tmp_path / (name or "none.txt")
    if name:
        path.write_bytes(content)
    code, out, err = main("explain", folders["llama"], "--data", path)
    assert code == 2 and not out and "--data: got" in err and said in err and "Traceback" not in err


def test_text_is_read_from_lines_objects_lists_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n"four"\n')
    (tmp_path / "c.json").write_text('["five", {"text": "six"}]')
    (tmp_path / "d.bin").write_bytes(b"\xff")
    assert text.read(tmp_path) == ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize(
    "words",
    [
        ("--target", "gpu"),
        ("--task", "nothing"),
        ("--dtype", "int3"),
        ("--recipe", "nothing.toml"),
        ("--stats", "nothing.safetensors"),
    ],
)
def test_wrong_words_are_a_message(folders, main, tmp_path, words):
    code, out, said = main("compile", folders["llama"], tmp_path / "m.thr", "--data", folders["data"], *words)
    assert code == 2 and not out and "accepted is" in said and "Traceback" not in said, said


def test_a_model_that_cannot_be_called_is_that_and_no_defect(folders, main, monkeypatch):
    model, tokenizer = models.load(str(folders["llama"]))
    monkeypatch.setattr(models, "load", lambda *_: (model, tokenizer))
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(3, 3)
    code, _, said = main("explain", folders["llama"], "--data", folders["data"])
    assert code == 2 and "LlamaForCausalLM itself cannot be called" in said, said
