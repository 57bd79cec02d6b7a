"""Low-bit linears in the layouts other tools read: GPTQ, and compressed-tensors `pack-quantized`.

Both store the bit stream of `thresher.formats.bitpack`. compressed-tensors packs along the inputs, as we do, and its
zero points along the outputs; GPTQ packs inputs into rows, [words(K), N], and its zero points along the
outputs. GPTQ's first format stores zero points less one; `gptq_v2` stores them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from thresher.errors import ArgumentError
from thresher.formats import bitpack
from thresher.reading import reading
from thresher.tensor_files import write_tensors

FORMATS = ("gptq", "gptq_v2", "compressed-tensors")
_FIX = "Fetch or write it again, or pass the layout and bits it really has."
_GPTQ_KEYS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_COMPRESSED_KEYS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias")


@dataclass(frozen=True)
class LowBitLinear:
    """A quantised linear, in the argument layout of `thresher::wna16_linear`.

    codes: int32 [N, words(K, bits)]. scales: floating [N, G]. zeros: uint8 [N, G], or None for
    2 ** (bits - 1). bias: [N] or None. group_size: K / G, or -1 for one group a row.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    group_size: int
    in_features: int

    def zero_points(self) -> torch.Tensor:
        """uint8 [N, G], the symmetric ones written out."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)


def to_gptq(linear: LowBitLinear, version: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of a GPTQ linear. Version 1 cannot hold a zero point of 0 as such: it wraps to 2^bits - 1
    and readers add one modulo 2^bits, except some old kernels; version 2 has no such case."""
    if linear.in_features % 32 or linear.codes.shape[0] % 32:
        raise ArgumentError(
            "linear",
            f"[{linear.codes.shape[0]}, {linear.in_features}]",
            "in_features and out_features that are multiples of 32",
            "Use the compressed-tensors format, which takes any size.",
        )
    zeros = linear.zero_points()
    if version == 1:
        zeros = (zeros.int() - 1) & ((1 << linear.bits) - 1)
    group = linear.in_features if linear.group_size < 0 else linear.group_size
    tensors = {
        "qweight": linear.codes.t().contiguous(),
        "qzeros": bitpack.pack(zeros.t().contiguous(), linear.bits),
        "scales": linear.scales.t().contiguous(),
        "g_idx": (torch.arange(linear.in_features) // group).to(torch.int32),
    }
    return tensors if linear.bias is None else {**tensors, "bias": linear.bias}


def from_gptq(tensors: Mapping[str, torch.Tensor], bits: int, version: int = 1) -> LowBitLinear:
    """A GPTQ linear. One whose groups are not runs of columns (activation order without static groups) is
    refused: its columns would need an index at every call."""
    bitpack.check_bits(bits)
    qweight, scales, g_idx = tensors["qweight"], tensors["scales"], tensors.get("g_idx")
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = scales.shape[0]
    size = inputs // groups
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(inputs) // size):
        raise ArgumentError(
            "g_idx",
            "a permutation of columns",
            "groups that are runs of columns",
            "Quantise with static groups.",
        )
    zeros = bitpack.unpack(tensors["qzeros"], bits, outputs)
    if version == 1:
        zeros = ((zeros.int() + 1) & ((1 << bits) - 1)).to(torch.uint8)
    return LowBitLinear(
        codes=qweight.t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=_implicit(zeros.t().contiguous(), bits),
        bias=tensors.get("bias"),
        bits=bits,
        group_size=-1 if groups == 1 else size,
        in_features=inputs,
    )


def to_compressed_tensors(linear: LowBitLinear) -> dict[str, torch.Tensor]:
    """The tensors of a compressed-tensors pack-quantized linear. Codes are offset by 2 ** (bits - 1) in both
    layouts, so the words are ours."""
    tensors = {
        "weight_packed": linear.codes,
        "weight_scale": linear.scales,
        "weight_shape": torch.tensor([linear.codes.shape[0], linear.in_features]),
    }
    if linear.zeros is not None:
        packed = bitpack.pack(linear.zeros.t().contiguous(), linear.bits)
        tensors["weight_zero_point"] = packed.t().contiguous()
    return tensors if linear.bias is None else {**tensors, "bias": linear.bias}


def from_compressed_tensors(tensors: Mapping[str, torch.Tensor], bits: int) -> LowBitLinear:
    """A pack-quantized linear with int weights, per channel or in groups."""
    bitpack.check_bits(bits)
    outputs, inputs = (int(n) for n in tensors["weight_shape"])
    codes, scales = tensors["weight_packed"], tensors["weight_scale"]
    if codes.shape != (outputs, bitpack.words(inputs, bits)):
        raise ArgumentError(
            "weight_packed",
            tuple(codes.shape),
            f"[{outputs}, {bitpack.words(inputs, bits)}]: {bits}-bit codes without gaps",
            "Older versions of compressed-tensors leave gaps at 3 bits: save the model again with a newer one.",
        )
    zeros = tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = bitpack.unpack(zeros.t().contiguous(), bits, outputs).t().contiguous()
    groups = scales.shape[1]
    return LowBitLinear(
        codes=codes,
        scales=scales,
        zeros=None if zeros is None else _implicit(zeros, bits),
        bias=tensors.get("bias"),
        bits=bits,
        group_size=-1 if groups == 1 else inputs // groups,
        in_features=inputs,
    )


def save(path: str | Path, linears: Mapping[str, LowBitLinear], layout: str, **others: torch.Tensor) -> None:
    """Write linears by FQN, and `others` as they are, to one safetensors file.

    layout: one of FORMATS. The file's metadata holds the quantisation config that transformers expects in
    config.json (`quantization_config`), so that it can be copied there, and each linear's bits for `load`.
    """
    _check_layout(layout)
    tensors = dict(others)
    for name, linear in linears.items():
        if layout == "compressed-tensors":
            parts = to_compressed_tensors(linear)
        else:
            parts = to_gptq(linear, 2 if layout == "gptq_v2" else 1)
        tensors.update({f"{name}.{key}": tensor.contiguous() for key, tensor in parts.items()})
    metadata = {
        "format": "pt",
        "thresher.layout": layout,
        "thresher.bits": json.dumps({name: linear.bits for name, linear in linears.items()}),
        "quantization_config": json.dumps(quantization_config(linears, layout)),
    }
    write_tensors(Path(path), tensors, metadata)


def load(
    path: str | Path, layout: str | None = None, bits: int | Mapping[str, int] | None = None
) -> tuple[dict[str, LowBitLinear], dict[str, torch.Tensor]]:
    """(linears by FQN, the other tensors). layout and bits are read from the file where `save` wrote it;
    for another tool's file pass both (bits: one number, or one per FQN)."""
    if layout is not None:
        _check_layout(layout)
    with reading(path, "a checkpoint", _FIX), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    layout = layout or metadata.get("thresher.layout")
    if layout is None or (bits is None and "thresher.bits" not in metadata):
        raise ArgumentError(
            "layout",
            f"{layout}, bits={bits}",
            f"one of {', '.join(FORMATS)}, and bits",
            f"{path} does not name both.",
        )
    linears = {}
    with reading(path, f"low-bit linears ({layout})", _FIX):
        _check_layout(layout)  # that the file names
        widths = json.loads(metadata["thresher.bits"]) if bits is None else bits
        marker = ".weight_packed" if layout == "compressed-tensors" else ".qweight"
        keys = _COMPRESSED_KEYS if layout == "compressed-tensors" else _GPTQ_KEYS
        for name in [key.removesuffix(marker) for key in tensors if key.endswith(marker)]:
            parts = {key: tensors.pop(f"{name}.{key}") for key in keys if f"{name}.{key}" in tensors}
            width = widths if isinstance(widths, int) else widths[name]
            if layout == "compressed-tensors":
                linears[name] = from_compressed_tensors(parts, width)
            else:
                linears[name] = from_gptq(parts, width, 2 if layout == "gptq_v2" else 1)
    return linears, tensors


def quantization_config(linears: Mapping[str, LowBitLinear], layout: str) -> dict:
    """The `quantization_config` of a transformers config.json for these linears.

    GPTQ names one width and group for all; linears that differ are refused there. compressed-tensors gets
    one group of targets for each kind.
    """
    kinds: dict[tuple[int, int, bool], list[str]] = {}
    for name, linear in linears.items():
        kinds.setdefault((linear.bits, linear.group_size, linear.zeros is None), []).append(name)
    if layout != "compressed-tensors":
        if len({kind[:2] for kind in kinds}) > 1:
            raise ArgumentError(
                "linears",
                f"{len(kinds)} kinds",
                "one width and group size",
                "Use the compressed-tensors format.",
            )
        bits, group, symmetric = next(iter(kinds), (4, -1, True))
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric and len(kinds) <= 1,
            "desc_act": False,
            "checkpoint_format": layout,
        }
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group < 0 else "group",
                "group_size": None if group < 0 else group,
            },
        }
        for i, ((bits, group, symmetric), names) in enumerate(kinds.items())
    }
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def _implicit(zeros: torch.Tensor, bits: int) -> torch.Tensor | None:
    """None where every zero point is the symmetric one."""
    return None if bool((zeros == 1 << (bits - 1)).all()) else zeros


def _check_layout(layout: str) -> None:
    if layout not in FORMATS:
        raise ArgumentError("layout", repr(layout), ", ".join(FORMATS), "Choose one of those.")
