"""Checkpoints: byte-identical round trips in both formats, torchao's weights, streaming, damaged input."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.errors import ArgumentError
from thresher.kernels.nvfp4.quantize import quantize
from thresher.runtime.checkpoints import nvfp4_stream
from thresher.runtime.checkpoints.nvfp4 import (
    KEYS,
    CheckpointError,
    from_tensors,
    from_torchao,
    layers,
    load,
    to_tensors,
)
from thresher.runtime.checkpoints.nvfp4_stream import quantize_checkpoint


def layer(form, scale=0.0037, activation=0.0191):
    """A layer's tensors as a tool stores them, with scales whose reciprocal does not round back."""
    q = quantize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), mode=form)
    shape = () if form == "modelopt" else (1,)
    values = (q.codes, q.block_scales, torch.full(shape, scale), torch.full(shape, activation))
    return {f"model.fc.{key}": value for key, value in zip(KEYS[form], values)}


def same_bytes(a, b):
    return (
        a.keys() == b.keys()
        and all(
            a[k].dtype == b[k].dtype
            and a[k].shape == b[k].shape
            and torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
            for k in a
            if a[k].dim()
        )
        and all(torch.equal(a[k], b[k]) for k in a if not a[k].dim())
    )


def test_the_reciprocal_alone_would_lose_bits():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.001
    assert (x.reciprocal().reciprocal() != x).float().mean() > 0.1


@pytest.mark.parametrize("form", KEYS)
def test_round_trip_gives_the_same_bytes(form, tmp_path):
    for seed in range(20):  # some of these scales are not the reciprocal of their reciprocal
        tensors = layer(
            form, *(torch.rand(2, generator=torch.Generator().manual_seed(seed)) + 0.001).tolist()
        )
        save_file(tensors, tmp_path / "a.safetensors")
        (name, weight), *rest = load(tmp_path / "a.safetensors").items()
        assert name == "model.fc" and not rest
        assert same_bytes(to_tensors(name, weight, form), tensors)


def test_formats_store_reciprocal_scales():
    weight = from_tensors("model.fc", layer("modelopt"), "modelopt")
    other = to_tensors("model.fc", weight, "compressed_tensors")
    assert other["model.fc.weight_global_scale"].item() == pytest.approx(1 / 0.0037)
    assert other["model.fc.input_global_scale"].shape == (1,)
    back = from_tensors("model.fc", other, "compressed_tensors")
    torch.testing.assert_close(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("form", KEYS)
def test_quantized_layers_can_be_written(form):
    q = quantize(torch.randn(8, 32), mode=form)
    tensors = to_tensors("fc", q, form)
    assert layers(tensors) == {"fc": form}
    assert torch.equal(from_tensors("fc", tensors, form).dequantize(), q.dequantize())
    with pytest.raises(ArgumentError, match="multiple of 16"):
        to_tensors("fc", quantize(torch.randn(4, 20)), form)


@pytest.mark.parametrize("swizzled", [False, True])
def test_torchao_weights(swizzled):
    tool = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(40, 96)
    tensor = tool.NVFP4Tensor.to_nvfp4(
        x, per_tensor_scale=tool.per_tensor_amax_to_scale(x.abs().max()), is_swizzled_scales=swizzled
    )
    weight = from_torchao(tensor)
    assert weight.codes.data_ptr() == tensor.qdata.data_ptr()
    torch.testing.assert_close(weight.dequantize(), tensor.dequantize(torch.float32), rtol=1e-6, atol=0)
    with pytest.raises(ArgumentError, match="transposed"):
        from_torchao(tensor.t())


def test_other_tensors_are_not_torchao_weights():
    with pytest.raises(ArgumentError, match="NVFP4Tensor"):
        from_torchao(torch.ones(2, 16))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("weight_scale", None, "is missing"),
        ("weight", torch.zeros(8, 16, dtype=torch.int8), "packed NVFP4 is uint8"),
        ("weight", torch.zeros(8, 12, dtype=torch.uint8), "multiple of 16"),
        ("weight_scale", torch.zeros(8, 3, dtype=torch.float8_e4m3fn), "must be float8_e4m3fn"),
        ("weight_scale", torch.zeros(8, 2), "must be float8_e4m3fn"),
        (
            "weight_scale",
            torch.full((8, 2), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "NaN or negative",
        ),
        ("weight_scale_2", torch.zeros(()), "finite and positive"),
        ("weight_scale_2", torch.tensor(float("inf")), "finite and positive"),
        ("weight_scale_2", torch.ones(3), "one float32 value"),
        ("input_scale", torch.ones((), dtype=torch.bfloat16), "one float32 value"),
    ],
)
def test_layers_that_do_not_fit_together(key, value, message):
    tensors = layer("modelopt")
    if value is None:
        del tensors[f"model.fc.{key}"]
    else:
        tensors[f"model.fc.{key}"] = value
    with pytest.raises(CheckpointError, match=rf"model\.fc\.{key}.*{message}"):
        from_tensors("model.fc", tensors, "modelopt")


def test_unknown_format():
    with pytest.raises(ArgumentError, match="Did you mean 'modelopt'"):
        from_tensors("fc", {}, "model-opt")


def model(path, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, 64, generator=generator),
        "model.layers.0.fc.weight": torch.randn(48, 64, generator=generator),
        "model.layers.0.fc.bias": torch.randn(48, generator=generator),
        "model.layers.0.odd.weight": torch.randn(16, 20, generator=generator),
        "model.layers.1.fc.weight": torch.randn(300, 64, generator=generator),
    }
    tensors = {name: t.to(dtype) for name, t in tensors.items()} | {"steps": torch.arange(5)}
    save_file(tensors, path, metadata={"format": "pt", "note": "kept"})
    return tensors


@pytest.mark.parametrize("form", KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streaming_equals_quantizing_whole_tensors(tmp_path, monkeypatch, form, dtype):
    tensors = model(tmp_path / "model.safetensors", dtype)
    monkeypatch.setattr(nvfp4_stream, "_SLAB_BYTES", 5000)  # several slabs a tensor, none aligned with it
    out = tmp_path / "out"
    summary = quantize_checkpoint(tmp_path / "model.safetensors", out, mode=form, form=form, progress=False)
    assert summary.quantized == ("model.layers.0.fc.weight", "model.layers.1.fc.weight")
    assert "model.layers.0.odd.weight" in summary.kept and summary.bytes_written < summary.bytes_read
    written = load_file(out / "model.safetensors")
    expected = {name: t for name, t in tensors.items() if name not in summary.quantized}
    for name in summary.quantized:
        expected |= to_tensors(name.removesuffix(".weight"), quantize(tensors[name], mode=form), form)
    assert same_bytes(written, expected)
    assert set(load(out / "model.safetensors")) == {"model.layers.0.fc", "model.layers.1.fc"}


def test_streaming_a_directory_of_shards(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    save_file({"a.weight": torch.randn(16, 32)}, source / "model-1.safetensors")
    save_file({"b.weight": torch.randn(16, 32), "c": torch.ones(3)}, source / "model-2.safetensors")
    summary = quantize_checkpoint(source, tmp_path / "out", progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert summary.quantized == ("a.weight", "b.weight")
    assert index["weight_map"]["b.weight_scale_2"] == index["weight_map"]["c"] == "model-2.safetensors"


def test_streaming_shows_progress(tmp_path, capsys):
    model(tmp_path / "model.safetensors")
    quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "out")
    assert "model.layers.1.fc.weight" in capsys.readouterr().out


def test_streaming_refuses_non_finite_weights_by_name_and_leaves_no_file(tmp_path):
    bad = torch.randn(16, 32)
    bad[3, 3] = float("nan")
    save_file({"x.fc.weight": bad}, tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match=r"x\.fc\.weight: got NaN"):
        quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", progress=False)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_files(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    model(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        quantize_checkpoint(path, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="does not hold NVFP4 weights"):
        load(path)


def test_bad_paths_and_names(tmp_path):
    with pytest.raises(ArgumentError, match="safetensors file"):
        quantize_checkpoint(tmp_path, tmp_path / "out", progress=False)
    model(tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match="another directory"):
        quantize_checkpoint(tmp_path, tmp_path, progress=False)
    with pytest.raises(ArgumentError, match="one of"):
        quantize_checkpoint(tmp_path, tmp_path / "out", form="gguf", progress=False)
