"""NVFP4 checkpoints: ModelOpt's and compressed-tensors' tensors in, the same bytes out; torchao's weights.

    ModelOpt             X.weight, X.weight_scale, X.weight_scale_2 (amax / 2688), X.input_scale
    compressed-tensors   X.weight_packed, X.weight_scale, X.weight_global_scale (2688 / amax),
                         X.input_global_scale (the reciprocal of ModelOpt's)

The reciprocal of a reciprocal is another number in fp32 one time in six, so a weight keeps the tensor
scales as they were stored, and writing in the same format gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from thresher.errors import ArgumentError, ThresherError, unknown_key
from thresher.formats.nvfp4 import BLOCK, unswizzle
from thresher.kernels.nvfp4.quantize import NVFP4Weight
from thresher.reading import reading

KEYS: dict[str, tuple[str, str, str, str]] = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed_tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}
"""Format -> names of the codes, block scales, tensor scale and activation scale of a layer."""
_RECIPROCAL = {"modelopt": False, "compressed_tensors": True}


class CheckpointError(ThresherError):
    """A file is damaged, or its tensors do not belong together. Names the file or the layer."""


def _format_named(name: str) -> tuple[str, str, str, str]:
    if name not in KEYS:
        raise unknown_key("format", name, KEYS)
    return KEYS[name]


def layers(names: Iterable[str]) -> dict[str, str]:
    """Layer name -> format, for the layers whose tensors are among `names`."""
    present = set(names)
    found = {}
    for form, (codes, scales, tensor_scale, _) in KEYS.items():
        suffix = f".{tensor_scale}"
        for name in present:
            layer = name.removesuffix(suffix)
            if name.endswith(suffix) and {f"{layer}.{codes}", f"{layer}.{scales}"} <= present:
                found[layer] = form
    return dict(sorted(found.items()))


def from_tensors(layer: str, tensors: Mapping[str, torch.Tensor], form: str) -> NVFP4Weight:
    """The weight of `layer` from a checkpoint's tensors; codes and scales share their storage.

    Raises CheckpointError, naming the tensor, for a missing one or a wrong shape, dtype or value.
    """
    names = [f"{layer}.{key}" for key in _format_named(form)]
    for name in names[:3]:
        if name not in tensors:
            raise CheckpointError(f"{name} is missing; layer {layer} needs {', '.join(names[:3])}.")
    codes, scales, stored = (tensors[name] for name in names[:3])
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % 8:
        raise CheckpointError(
            f"{names[0]} is {codes.dtype} {tuple(codes.shape)}; "
            "packed NVFP4 is uint8 [out_features, in_features / 2] with in_features a multiple of 16."
        )
    expected = (codes.shape[0], codes.shape[1] // 8)
    if scales.dtype != torch.float8_e4m3fn or tuple(scales.shape) != expected:
        raise CheckpointError(
            f"{names[1]} is {scales.dtype} {tuple(scales.shape)}; with {names[0]} of {tuple(codes.shape)} "
            f"it must be float8_e4m3fn {expected}. Swizzled scales must be unswizzled first."
        )
    if bool((scales.view(torch.uint8) >= 0x7F).any()):
        raise CheckpointError(f"{names[1]} holds NaN or negative scales; requantize {layer}.")
    multiplier = _multiplier(names[2], stored, form)
    activation = tensors.get(names[3])
    return NVFP4Weight(
        codes,
        scales,
        multiplier,
        codes.shape[1] * 2,
        stored_global=stored,
        input_scale=None if activation is None else _multiplier(names[3], activation, form),
        stored_input=activation,
    )


def _multiplier(name: str, stored: torch.Tensor, form: str) -> torch.Tensor:
    if stored.dtype != torch.float32 or stored.numel() != 1:
        raise CheckpointError(
            f"{name} is {stored.dtype} {tuple(stored.shape)}; it must be one float32 value."
        )
    value = stored.reshape(()).reciprocal() if _RECIPROCAL[form] else stored.reshape(())
    if not (value.isfinite() and value > 0):
        raise CheckpointError(f"{name} is {stored.item()}; a tensor scale must be finite and positive.")
    return value


def to_tensors(layer: str, weight: NVFP4Weight, form: str) -> dict[str, torch.Tensor]:
    """The tensors of `layer` in that format. Bytes are the original ones if it was read from it.

    Raises ArgumentError when in_features is not a multiple of 16: neither format can say so.
    """
    codes, scales, tensor_scale, activation = (f"{layer}.{key}" for key in _format_named(form))
    if weight.in_features % BLOCK:
        given = f"{weight.in_features} input features"
        raise ArgumentError(
            layer, given, "a multiple of 16", "Keep this layer unquantized in the checkpoint."
        )
    tensors = {
        codes: weight.codes,
        scales: weight.block_scales,
        tensor_scale: _stored(weight.stored_global, weight.global_scale, form),
    }
    if weight.input_scale is not None:
        tensors[activation] = _stored(weight.stored_input, weight.input_scale, form)
    return tensors


def _stored(original: torch.Tensor | None, value: torch.Tensor, form: str) -> torch.Tensor:
    """The original tensor when it means `value` in this format, else a fresh one."""
    reciprocal = _RECIPROCAL[form]
    if original is not None:
        meaning = original.reshape(()).reciprocal() if reciprocal else original.reshape(())
        if torch.equal(meaning, value.reshape(())):
            return original
    return value.reshape(1).reciprocal() if reciprocal else value.reshape(())


def load(path: str | Path) -> dict[str, NVFP4Weight]:
    """Every NVFP4 layer of a safetensors file, by name; the format is recognised from the keys.

    Raises CheckpointError for a damaged file or layer.
    """
    with (
        reading(path, "NVFP4 weights", "Fetch or write it again.", CheckpointError),
        safe_open(path, framework="pt") as file,
    ):
        names = list(file.keys())
        weights = {}
        for layer, form in layers(names).items():
            wanted = {f"{layer}.{key}" for key in KEYS[form]}.intersection(names)
            weights[layer] = from_tensors(layer, {name: file.get_tensor(name) for name in wanted}, form)
        return weights


def from_torchao(tensor: Any) -> NVFP4Weight:
    """A torchao `NVFP4Tensor` weight [N, K]; codes and unswizzled scales are shared, not copied."""
    needed = ("qdata", "scale", "block_size", "is_swizzled_scales")
    if any(not hasattr(tensor, name) for name in needed) or tensor.dim() != 2:
        given = f"{type(tensor).__name__} {tuple(tensor.shape)}"
        raise ArgumentError(
            "tensor", given, "a two-dimensional torchao NVFP4Tensor", "Quantize it with torchao."
        )
    codes, scales, rows = tensor.qdata, tensor.scale, tensor.shape[0]
    if codes.stride(-1) != 1:
        raise ArgumentError(
            "tensor", "a transposed weight", "the weight [out, in] itself", "Call .t() on it."
        )
    if tensor.is_swizzled_scales:
        scales = unswizzle(scales, rows, tensor.shape[1] // BLOCK)
    one = torch.ones((), device=codes.device)
    weight_scale = one if tensor.per_tensor_scale is None else tensor.per_tensor_scale.reshape(())
    activation = getattr(tensor, "act_per_tensor_scale", None)
    return NVFP4Weight(
        codes.view(torch.uint8),
        scales.view(torch.float8_e4m3fn).reshape(rows, -1),
        weight_scale,
        tensor.shape[1],
        input_scale=None if activation is None else activation.reshape(()),
    )
