"""Safetensors files by memory map: what is written is what the library reads, and memory is given back."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher import tensor_files
from thresher.errors import ThresherError

TENSORS = {
    "odd": torch.arange(5, dtype=torch.uint8),
    "wide": torch.randn(7, 3, dtype=torch.float64),
    "half": torch.randn(3, 5).bfloat16(),
    "scale": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
}


def same(found):
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].double(), tensor.double()), name


def written(path, metadata=None):
    shapes = [(n, t.dtype, t.shape) for n, t in TENSORS.items()]
    return tensor_files.write(path, shapes, TENSORS.__getitem__, metadata or {})


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    size = written(tmp_path / "a.safetensors", {"kind": "test"})
    assert size == (tmp_path / "a.safetensors").stat().st_size
    same(load_file(str(tmp_path / "a.safetensors")))
    save_file(TENSORS, str(tmp_path / "b.safetensors"), {"kind": "test"})
    for name in "ab":
        held = tensor_files.MappedFile(tmp_path / f"{name}.safetensors")
        same({n: held.tensor(n) for n in held.entries})
        assert held.metadata == {"kind": "test"}


def test_bytes_between_their_multiples_are_read(tmp_path):
    save_file(
        {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(4.0)}, str(tmp_path / "c.safetensors")
    )
    content = (tmp_path / "c.safetensors").read_bytes()
    odd = content.replace(b'"data_offsets":[0,16]', b'"data_offsets":[3,19]').replace(
        b'"data_offsets":[16,19]', b'"data_offsets":[0,3]  '
    )
    length = int.from_bytes(odd[:8], "little")
    body = odd[8 + length :]
    (tmp_path / "c.safetensors").write_bytes(odd[: 8 + length] + body[16:19] + body[:16])
    held = tensor_files.MappedFile(tmp_path / "c.safetensors")
    assert held.tensor("b").tolist() == [0, 1, 2, 3] and held.tensor("a").tolist() == [0, 1, 2]


def test_released_memory_is_read_again_and_a_settled_file_may_be_written_to(tmp_path):
    written(tmp_path / "a.safetensors")
    held = tensor_files.MappedFile(tmp_path / "a.safetensors")
    wide = held.tensor("wide")
    assert torch.equal(wide, TENSORS["wide"])
    tensor_files.release()
    assert torch.equal(wide, TENSORS["wide"])
    held.settle()
    wide[0] = 3.0
    tensor_files.release()
    assert (wide[0] == 3).all() and torch.equal(load_file(str(held.path))["wide"], TENSORS["wide"])


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    written(path)
    before = path.read_bytes()

    def full(name):
        raise OSError(28, "No space left on device")

    shapes = [(n, t.dtype, t.shape) for n, t in TENSORS.items()]
    with pytest.raises(
        ThresherError, match=rf"{re.escape(str(path))} cannot be written: No space left.*make room"
    ):
        tensor_files.write(path, shapes, full, {})
    assert path.read_bytes() == before and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda b: b[:4], "truncated"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b.replace(b'"F64"', b'"F65"'), "which torch does not have"),
        (lambda b: b.replace(b'"BF16"', b'"F32" '), "and has 30 bytes"),
    ],
    ids=["head", "tail", "dtype", "size"],
)
def test_damage_is_an_error_that_names_the_file(tmp_path, damage, said):
    path = tmp_path / "a.safetensors"
    written(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ThresherError, match=said) as error:
        tensor_files.MappedFile(path)
    assert str(path) in str(error.value) and "Fetch it again" in str(error.value)
