"""Saved models: the same bits after loading, in a process without the model's code; and damaged files refused."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import masks
import pytest
import safetensors.torch
import torch
import zoo
from sampled import sampled
from saved_models import compiled, with_manifest

import thresher
from thresher.graph.program import Program, Weight
from thresher.runtime.artifact import file as artifact
from thresher.runtime.artifact import tensor_file
from thresher.runtime.artifact.program_json import ArtifactError


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
    with_manifest(path, compiled={**loaded.manifest["compiled"], "instructions": "AVX1024"})
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
