"""GPTQ and compressed-tensors files: the layout bit by bit, round trips, and what cannot be stored."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from thresher import tensor_files
from thresher.errors import ArgumentError
from thresher.formats import bitpack
from thresher.kernels.wna16 import linear as wna16
from thresher.runtime.checkpoints import low_bit as interop

BITS = (2, 3, 4, 8)


def linear(bits, outputs=32, inputs=64, group=32, zeros=True, bias=False, seed=0):
    make = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=make)
    groups = 1 if group < 0 else inputs // group
    zero = torch.randint(0, 1 << bits, (outputs, groups), generator=make, dtype=torch.uint8)
    return interop.LowBitLinear(
        codes=bitpack.pack(codes, bits),
        scales=torch.rand(outputs, groups, generator=make).half() + 0.5,
        zeros=zero if zeros else None,
        bias=torch.randn(outputs, generator=make).half() if bias else None,
        bits=bits,
        group_size=group,
        in_features=inputs,
    )


def same(a, b):
    groups = [x.in_features if x.group_size < 0 else x.group_size for x in (a, b)]  # one group is one a row
    assert (a.bits, groups[0], a.in_features) == (b.bits, groups[1], b.in_features)
    for name in ("codes", "scales", "zeros", "bias"):
        first, second = getattr(a, name), getattr(b, name)
        assert (first is None) == (second is None), name
        assert first is None or (torch.equal(first, second) and first.dtype == second.dtype), name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group, zeros, bias", [(32, True, True), (-1, False, False), (64, False, True)])
@pytest.mark.parametrize("layout", interop.FORMATS)
def test_file_round_trip(tmp_path, bits, group, zeros, bias, layout):
    given = {
        "model.a": linear(bits, group=group, zeros=zeros, bias=bias),
        "model.b": linear(bits, group=group),
    }
    interop.save(tmp_path / "m.safetensors", given, layout, **{"model.norm.weight": torch.ones(3)})
    linears, others = interop.load(tmp_path / "m.safetensors")
    assert list(others) == ["model.norm.weight"] and set(linears) == set(given)
    for name, written in given.items():
        same(linears[name], written)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_layout_bit_by_bit(bits, version):
    given = linear(bits, outputs=64, inputs=96)
    tensors = interop.to_gptq(given, version)
    codes = bitpack.unpack(given.codes, bits, 96)
    assert tensors["qweight"].shape == (96 * bits // 32, 64) and tensors["qweight"].dtype == torch.int32
    for n in (0, 17, 63):
        stream = sum((int(w) & 0xFFFFFFFF) << 32 * i for i, w in enumerate(tensors["qweight"][:, n]))
        assert [stream >> k * bits & (1 << bits) - 1 for k in range(96)] == codes[n].tolist()
    assert tensors["qzeros"].shape == (3, 64 * bits // 32)
    for g in range(3):
        stream = sum((int(w) & 0xFFFFFFFF) << 32 * i for i, w in enumerate(tensors["qzeros"][g]))
        stored = [stream >> n * bits & (1 << bits) - 1 for n in range(64)]
        less = 1 if version == 1 else 0
        assert stored == [(int(z) - less) % (1 << bits) for z in given.zeros[:, g]]
    assert tensors["scales"].shape == (3, 64)
    assert tensors["g_idx"].tolist() == [k // 32 for k in range(96)]


def test_three_bit_gptq_words_are_the_published_ones():
    """Codes 0 .. 31 of a column: ten and two bits in the first word, one and ten and one in the second, ..."""
    codes = (torch.arange(32) * 5 + 3) % 8
    words = [int(w) & 0xFFFFFFFF for w in bitpack.pack(codes, 3)]
    c = codes.tolist()
    first = sum(c[j] << 3 * j for j in range(10)) | (c[10] & 3) << 30
    second = c[10] >> 2 | sum(c[11 + j] << 3 * j + 1 for j in range(10)) | (c[21] & 1) << 31
    third = c[21] >> 1 | sum(c[22 + j] << 3 * j + 2 for j in range(10))
    assert words == [first, second, third]


@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_layout(bits):
    given = linear(bits, outputs=40, inputs=96, bias=True)
    tensors = interop.to_compressed_tensors(given)
    assert tensors["weight_packed"] is given.codes and tensors["weight_shape"].tolist() == [40, 96]
    assert tensors["weight_zero_point"].shape == (bitpack.words(40, bits), 3)
    column = bitpack.unpack(tensors["weight_zero_point"].t().contiguous(), bits, 40)
    assert torch.equal(column.t(), given.zeros)
    same(interop.from_compressed_tensors(tensors, bits), given)


def test_compressed_tensors_takes_any_size():
    given = linear(3, outputs=5, inputs=77, group=-1)
    same(interop.from_compressed_tensors(interop.to_compressed_tensors(given), 3), given)
    with pytest.raises(ArgumentError, match="multiples of 32"):
        interop.to_gptq(given)


def test_a_loaded_linear_is_what_the_operator_takes():
    given = linear(4, bias=True)
    loaded = interop.from_gptq(interop.to_gptq(given), 4)
    x = torch.randn(3, 64)
    out = [
        wna16.wna16_linear(x, q.codes, q.scales, q.zeros, q.bias, q.bits, q.group_size)
        for q in (given, loaded)
    ]
    assert torch.equal(*out)


def test_gaps_and_permuted_groups_are_refused():
    tensors = interop.to_compressed_tensors(linear(3))
    tensors["weight_packed"] = torch.zeros(32, 7, dtype=torch.int32)  # ten codes a word
    with pytest.raises(ArgumentError, match="without gaps"):
        interop.from_compressed_tensors(tensors, 3)
    tensors = interop.to_gptq(linear(4))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ArgumentError, match="g_idx"):
        interop.from_gptq(tensors, 4)


def test_a_file_of_another_tool_needs_its_layout_and_bits(tmp_path):
    tensors = {f"a.{k}": v for k, v in interop.to_gptq(linear(4)).items()}
    save_file(tensors, tmp_path / "g.safetensors")
    with pytest.raises(ArgumentError, match="does not name both"):
        interop.load(tmp_path / "g.safetensors")
    linears, _ = interop.load(tmp_path / "g.safetensors", layout="gptq", bits=4)
    same(linears["a"], linear(4))
    with pytest.raises(ArgumentError, match="layout"):
        interop.load(tmp_path / "g.safetensors", layout="awq", bits=4)


def test_config_names_every_kind():
    kinds = {"a": linear(3, group=-1, zeros=False), "b": linear(4), "c": linear(4, seed=1)}
    config = interop.quantization_config(kinds, "compressed-tensors")
    assert [g["targets"] for g in config["config_groups"].values()] == [["a"], ["b", "c"]]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert config["config_groups"]["group_1"]["weights"]["group_size"] == 32
    with pytest.raises(ArgumentError, match="one width"):
        interop.quantization_config(kinds, "gptq")
    gptq = interop.quantization_config({"b": kinds["b"]}, "gptq_v2")
    assert (gptq["bits"], gptq["group_size"], gptq["sym"], gptq["checkpoint_format"]) == (
        4,
        32,
        False,
        "gptq_v2",
    )


def test_config_travels_in_the_file(tmp_path):
    interop.save(tmp_path / "m.safetensors", {"a": linear(3)}, "compressed-tensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
    assert config["format"] == "pack-quantized"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    interop.save(path, {"a": linear(4)}, "gptq")
    old = path.read_bytes()

    def interrupted(tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_files, "_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interop.save(path, {"a": linear(4, seed=9)}, "gptq")
    assert path.read_bytes() == old


def test_the_names_in_a_file_stay_what_they_are(tmp_path):
    """Files that exist already say their layout and widths under these."""
    interop.save(tmp_path / "m.safetensors", {"a": linear(4)}, "gptq")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["thresher.layout"] == "gptq" and json.loads(metadata["thresher.bits"]) == {"a": 4}
