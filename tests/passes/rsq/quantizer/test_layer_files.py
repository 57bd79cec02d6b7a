"""A finished layer's file is read only by the run that wrote it, for the layer it holds, and when it is whole."""

import os

import captures
import pytest
import torch

from thresher.errors import ThresherError
from thresher.passes.rsq.quantizer.files import LayerFiles, stamp_of

TENSORS = {"a:codes": torch.arange(40, dtype=torch.int32), "a:scales": torch.rand(4, 2)}


@pytest.fixture
def kept(tmp_path):
    files = LayerFiles(tmp_path, "stamp")
    files.write("model.layers.0", TENSORS, {"reports": "[]"})
    files.write("model.layers.1", {k: v + 1 for k, v in TENSORS.items()}, {"reports": "[]"})
    return files


def test_a_layer_comes_back_as_it_was(kept):
    tensors, metadata = kept.read("model.layers.0")
    assert all(torch.equal(t, TENSORS[k]) for k, t in tensors.items()) and metadata["reports"] == "[]"
    assert kept.read("model.layers.2") is None
    assert LayerFiles(kept.folder, "another").read("model.layers.0") is None
    assert not list(kept.folder.glob("*.partial"))


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 7
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: os.truncate(p, p.stat().st_size // 2),
        lambda p: os.truncate(p, 0),
        lambda p: _flip(p, -1),
        lambda p: _flip(p, -100),
        lambda p: _flip(p, 3),
        lambda p: p.write_bytes(p.with_name("model.layers.1.safetensors").read_bytes()),
        lambda p: p.unlink() or p.mkdir(),
        lambda p: p.write_bytes(p.read_bytes().replace(b'"reports":"[]"', b'"reports":"[1"')),
    ],
    ids=["half", "empty", "last byte", "a code", "header", "another layer's", "a folder", "reports"],
)
def test_a_damaged_layer_is_an_error_that_names_the_file(kept, damage):
    path = kept.path("model.layers.0")
    damage(path)
    with pytest.raises(ThresherError) as error:
        kept.read("model.layers.0")
    assert str(path) in str(error.value) and "Delete the file" in str(error.value)
    assert kept.read("model.layers.1") is not None


def test_names_that_look_alike_in_a_file_system_have_files_of_their_own(tmp_path):
    files = LayerFiles(tmp_path, "stamp")
    names = ["a/b", "a_b", "a:b", "../a"]
    for number, name in enumerate(names):
        files.write(name, {"t": torch.tensor(number)}, {})
    assert [int(files.read(name)[0]["t"]) for name in names] == [0, 1, 2, 3]
    assert all(p.parent == tmp_path for p in tmp_path.rglob("*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ThresherError, match=r"file/a\.safetensors"):
        LayerFiles(tmp_path / "file", "stamp").write("a", TENSORS, {})


def test_any_weight_that_differs_is_another_run():
    program, inputs = captures.of_zoo("llama"), [{"input_ids": torch.arange(6)[None]}]
    first = stamp_of(program, "options", inputs)
    assert stamp_of(captures.of_zoo("llama"), "options", inputs) == first
    assert stamp_of(program, "other", inputs) != first
    assert stamp_of(program, "options", [{"input_ids": torch.arange(7)[None]}]) != first
    for weight in list(program.weights.values())[:3]:
        flat = weight.tensor.detach().view(-1)
        before = flat[-1].item()
        flat[-1] = before + 1
        assert stamp_of(program, "options", inputs) != first, weight.fqn
        flat[-1] = before
    assert stamp_of(program, "options", inputs) == first
