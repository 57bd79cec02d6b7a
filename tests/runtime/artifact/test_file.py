"""Saved models: the same bits after loading, in a process without the model's code; and damaged files refused."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import masks
import pytest
import safetensors.torch
import torch
import zoo
from sampled import sampled

import thresher
from thresher.errors import ArgumentError, ThresherError
from thresher.graph.program import Program, Weight
from thresher.runtime.artifact import file as artifact
from thresher.runtime.artifact import tensor_file
from thresher.runtime.artifact.program_json import ArtifactError


@functools.cache
def compiled(name, recipe="exact", dynamic=True):
    model, inputs = zoo.ZOO[name].build()
    return thresher.compile(model, inputs, recipe, target="reference", dynamic=dynamic), inputs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model, inputs = compiled("llama")
    path = tmp_path_factory.mktemp("saved") / "model.thresher"
    return thresher.save(model, path, example_inputs=inputs, longest=64), inputs


@pytest.fixture
def saved(written, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copy(written[0], tmp_path)), written[1]


@pytest.mark.parametrize("name", sampled(["bert", "mistral"], ["llama", "bert", "mistral"]))
def test_gives_the_same_bits_at_other_sizes_too(name, tmp_path):
    model, inputs = compiled(name)
    path = thresher.save(model, tmp_path / "m", example_inputs=inputs, longest=64)
    loaded = thresher.load(path, target="reference")
    calls = [inputs, *map(zoo.tokens, (masks.right((1, 9)), masks.left((4, 10, 6)), masks.right((7,))))]
    for call in calls:
        call = {k: v for k, v in call.items() if k in inputs}
        expected, actual = model(**call), loaded(**call)
        names = [n for n in actual if n in expected]
        assert names
        for each in names:
            assert torch.equal(torch.as_tensor(expected[each]), torch.as_tensor(actual[each])), each
    assert loaded.counters.packed == len(calls) - 1, "the one row has no padding"
    assert loaded.report.rewritten == model.report.rewritten
    assert loaded.manifest["recipe"] == model.recipe.to_dict() and "prepack" in loaded.manifest["recipe"]


def test_beyond_the_proven_length_a_packed_model_runs_padded(saved):
    path, _ = saved
    loaded = thresher.load(path, target="reference")
    loaded(**zoo.tokens(masks.right((3, 64))))
    assert loaded.counters.packed == 1
    model, _ = compiled("llama")
    call = zoo.tokens(masks.right((3, 65)))
    real = call["attention_mask"] == 1
    torch.testing.assert_close(loaded(**call).logits[real], model(**call).logits[real], rtol=1e-4, atol=1e-4)
    assert sum(loaded.counters.padded.values()) == 1


def test_loads_where_the_models_code_was_never_imported(saved):
    path, inputs = saved
    model, _ = compiled("llama")
    torch.save(inputs, path.parent / "inputs")
    script = (
        "import sys, torch, thresher\n"
        "folder = sys.argv[1]\n"
        "loaded = thresher.load(folder + '/model.thresher', target='reference')\n"
        "torch.save(loaded(**torch.load(folder + '/inputs')).logits, folder + '/logits')\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path.parent)], check=True, cwd=path.parent)
    assert torch.equal(torch.load(path.parent / "logits"), model(**inputs).logits)


def test_weights_changed_after_compiling_are_saved_as_they_are_now(tmp_path):
    model, inputs = zoo.ZOO["llama"].build()
    made = thresher.compile(model, inputs, "exact", target="reference", dynamic=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 3)
    loaded = thresher.load(thresher.save(made, tmp_path / "m", example_inputs=inputs), target="reference")
    assert torch.equal(loaded(**inputs).logits, made(**inputs).logits)


def test_no_member_is_a_pickle_and_safetensors_reads_the_weights(saved):
    path, _ = saved
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == {"weights.safetensors", "programs.json", "manifest.json"}
        tensors = safetensors.torch.load(archive.read("weights.safetensors"))
        programs = json.loads(archive.read("programs.json"))
    model, _ = compiled("llama")
    entry = programs["body"]["weights"]["w_lm_head_weight"]
    assert torch.equal(tensors[str(entry["tensor"])], model.model.lm_head.weight)
    shared = programs["layout"]["padded"]["weights"]["w_lm_head_weight"]
    assert shared["tensor"] == entry["tensor"]  # stored once for the packed and the padded program


def test_a_truncated_file_is_refused(saved):
    path, _ = saved
    whole = path.read_bytes()
    for share in (0, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ArtifactError, match=r"truncated|damaged|no readable manifest"):
            thresher.load(path)


def test_an_altered_byte_anywhere_is_refused(saved):
    path, _ = saved
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        spots = [i.header_offset + 40 + i.file_size // 2 for i in archive.infolist()]
    for spot in [*spots, len(whole) - 5]:  # the last lies in the manifest's checksum
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        with pytest.raises(ArtifactError, match=r"altered|damaged|truncated"):
            thresher.load(path)


def _with_manifest(path, **changes):
    """Rewrite the manifest, checksum and all: what a newer writer would have written."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    text = json.dumps({**json.loads(members.pop("manifest.json")), **changes}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, "manifest.json": text}.items():
            archive.writestr(name, data)
        archive.comment = hashlib.sha256(text).hexdigest().encode()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 99}, "format 99"),
        ({"operators": {"aten.no_such_operator.default": ""}}, "aten.no_such_operator.default"),
        ({"operators": {"thresher.hadamard.default": "thresher::hadamard(Tensor x) -> Tensor"}}, "Save the model again"),
        ({"machine": {"devices": ["cpu", "cuda"], "byte_order": sys.byteorder}}, "GPU"),
        ({"machine": {"devices": ["cpu"], "byte_order": "big"}}, "endian"),
    ],
)  # fmt: skip
def test_another_version_or_machine_is_refused(saved, changes, message):
    path, _ = saved
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    _with_manifest(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        thresher.load(path)


def test_a_member_the_manifest_does_not_list_is_refused(saved):
    path, _ = saved
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.py", "print('never')")
    with pytest.raises(ArtifactError, match="altered"):
        thresher.load(path)


def test_a_graph_may_call_operators_only(saved):
    path, _ = saved
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    programs = members["programs.json"].replace(b'"aten.silu.default"', b'"os.system"')
    manifest = json.loads(members["manifest.json"])
    manifest["sha256"]["programs.json"] = hashlib.sha256(programs).hexdigest()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.safetensors", members["weights.safetensors"])
        archive.writestr("programs.json", programs)
        text = json.dumps(manifest).encode()
        archive.writestr("manifest.json", text)
        archive.comment = hashlib.sha256(text).hexdigest().encode()
    with pytest.raises(ArtifactError, match=r"operator 'os\.system'"):
        thresher.load(path)


def test_code_runs_only_when_allowed_by_name(saved):
    path, _ = saved
    with pytest.raises(ArgumentError, match="allow_compiled=True"):
        thresher.load(path, target="compiled")
    with pytest.raises(ArtifactError, match="holds no machine code"):
        thresher.load(path, target="compiled", allow_compiled=True)
    with pytest.raises(ArgumentError, match="compiled, inductor, reference"):
        thresher.load(path, target="onnx")


def test_an_interrupted_save_leaves_the_old_file(saved):
    path, inputs = saved
    before = path.read_bytes()
    script = (
        "import sys, time, torch\n"
        "from thresher.runtime.artifact import file as artifact\n"
        "def chunks():\n"
        "    yield memoryview(b'x' * 1000)\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "artifact.Pool.chunks = lambda self: chunks()\n"
        "from thresher.runtime.artifact import archive\n"
        "from pathlib import Path\n"
        "with archive.replacing(Path(sys.argv[1])) as file:\n"
        "    archive.write(file, {'weights.safetensors': chunks()}, {})\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"writing"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == before
    assert torch.is_tensor(thresher.load(path, target="reference")(**inputs).logits)


def test_a_full_disk_leaves_the_old_file_and_says_so(saved):
    path, _ = saved
    before = path.read_bytes()
    script = (
        "import resource, signal, sys, torch\n"
        "from thresher.runtime.artifact import archive\n"
        "from thresher.runtime.artifact.program_json import ArtifactError\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with archive.replacing(Path(sys.argv[1])) as file:\n"
        "        archive.write(file, {'weights.safetensors': iter([memoryview(b'x' * 100000)])}, {})\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert "was not written" in ran.stdout and "unchanged" in ran.stdout, ran
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda i: {}, "input_ids"),
        (lambda i: {**i, "labels": i["input_ids"]}, "labels"),
        (lambda i: {**i, "input_ids": i["input_ids"].int()}, "int64"),
        (lambda i: {**i, "input_ids": i["input_ids"].tolist()}, "list"),
        (lambda i: {**i, "attention_mask": i["attention_mask"][:, :-1]}, "sizes"),
    ],
)
def test_wrong_inputs_are_named(saved, call, named):
    path, inputs = saved
    loaded = thresher.load(path, target="reference")
    with pytest.raises(ArgumentError, match=named):
        loaded(**call(inputs))


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(ArgumentError, match=r"thresher\.compile"):
        thresher.save(torch.nn.Linear(2, 2), tmp_path / "m")
    model, _ = compiled("llama")
    with pytest.raises(ArgumentError, match="example_inputs"):
        thresher.save(model, tmp_path / "m")

    class Broken(torch.nn.Module):
        def forward(self, x):
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    made = thresher.compile(Broken().eval(), (torch.ones(3, 4),), "none", target="reference")
    with pytest.raises(ThresherError, match="2 graphs"):
        thresher.save(made, tmp_path / "m", example_inputs=(torch.ones(3, 4),))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    model, inputs = compiled("llama")
    monkeypatch.setattr(type(model), "__call__", lambda *_, **__: pytest.fail("the model was run first"))
    for path in (tmp_path, tmp_path / "file" / "model"):
        with pytest.raises(ArgumentError, match="path"):
            thresher.save(model, path, example_inputs=inputs)
        with pytest.raises(ArgumentError, match="path"):
            thresher.export_onnx(model.model, inputs, path)


def test_every_dtype_layout_and_argument_survives(tmp_path):
    """A program built by hand: strided, half, fp8, empty and scalar weights; infinities, slices, dtypes."""
    tensors = {
        "strided": torch.randn(6, 4).t(),
        "half": torch.randn(4, 3, dtype=torch.float16),
        "brain": torch.randn(3, dtype=torch.bfloat16),
        "byte": torch.randn(4, 6).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 6),
        "flags": torch.rand(6) < 0.5,
        "gap": torch.randn(4, 12)[:, ::2],
    }
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    program = Program(module, {}, ["x"])
    graph = module.graph
    x = graph.placeholder("x")
    reads = {}
    for name, tensor in tensors.items():
        reads[name] = graph.create_node("get_attr", program.add_weight(Weight(name, tensor)))
    aten = torch.ops.aten
    moved = graph.call_function(aten.mul.Tensor, (x, reads["scalar"]))
    masked = graph.call_function(aten.masked_fill.Scalar, (moved, reads["flags"], -torch.inf))
    half = graph.call_function(aten.to.dtype, (masked, torch.float16))
    graph.output((moved, masked, half, *reads.values()))
    module.recompile()
    x.meta["val"] = torch.empty(4, 6)
    path = thresher.save(program, tmp_path / "m")
    given = torch.randn(4, 6)
    for mine, theirs in zip(
        thresher.load(path, target="reference")(given).values(), program.run(given), strict=True
    ):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.equal(mine.float(), theirs.float())
    again = thresher.load(path, target="reference").program.weights
    for weight in again.values():
        assert weight.tensor.numel() == 0 or weight.tensor.data_ptr() % tensor_file.ALIGNMENT == 0
        if weight.fqn == "strided":
            assert weight.tensor.stride() == (1, 4)


@pytest.mark.slow
def test_inductor_gives_the_same_bits(tmp_path):
    model, inputs = zoo.ZOO["llama"].build()
    made = thresher.compile(model, inputs, "exact", dynamic=True)
    loaded = thresher.load(thresher.save(made, tmp_path / "m", example_inputs=inputs))
    for call in (inputs, zoo.tokens(masks.right((1, 7)))):
        assert torch.equal(loaded(**call).logits, made(**call).logits)
    assert loaded.counters.packed == 2


@pytest.mark.slow
def test_machine_code_runs_without_compiling(tmp_path):
    model, inputs = compiled("bert")
    path = thresher.save(model, tmp_path / "m", example_inputs=inputs, compiled=True)
    loaded = thresher.load(path, target="compiled", allow_compiled=True)
    started = time.perf_counter()
    actual = loaded(**inputs)
    assert time.perf_counter() - started < 10
    torch.testing.assert_close(
        actual.last_hidden_state, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4
    )
    _with_manifest(path, compiled={**loaded.manifest["compiled"], "instructions": "AVX1024"})
    with pytest.raises(ArtifactError, match="AVX1024"):
        thresher.load(path, target="compiled", allow_compiled=True)
    assert torch.equal(
        thresher.load(path, target="reference")(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    )


def test_files_are_readable_by_others_as_any_new_file(saved):
    path, _ = saved
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert artifact.FORMATS[0] == 1


@pytest.mark.parametrize(
    ("current", "serves"),
    [
        ("t::f(Tensor q, int n) -> Tensor", True),
        ("t::f(Tensor q, int n, Tensor? s=None, bool b=True) -> Tensor", True),
        ("t::f(Tensor q, int n, Tensor s) -> Tensor", False),
        ("t::f(Tensor q, int number) -> Tensor", False),
        ("t::f(Tensor q) -> Tensor", False),
        ("t::f(Tensor q, int n) -> (Tensor, Tensor)", False),
    ],
)
def test_an_operator_that_gained_what_may_be_left_out_still_serves(current, serves):
    assert artifact._serves(current, "t::f(Tensor q, int n) -> Tensor") == serves
