"""`thresher::nvfp4_expert_linear`: each row times the NVFP4 matrix of its own expert (4.5 bits a weight)."""

from __future__ import annotations

import torch

from thresher.errors import ArgumentError, unknown_key
from thresher.formats.nvfp4 import padded
from thresher.ops import Sample, define
from thresher.plain_form import Plain

from .. import arguments
from ..nvfp4 import cpu as nvfp4_cpu
from ..nvfp4.linear import nvfp4_linear
from ..nvfp4.plain import decode_e4m3, round_activations
from ..nvfp4.quantize import quantize
from .linear import price, routing
from .rows import MEMORY, by_expert, check_experts, each_row

ACTIVATIONS = ("exact", "int16", "int8")
"""As for `nvfp4_linear`; activations in NVFP4 share a scale over a call, and experts have calls of their own."""


def check(x, codes, block_scales, global_scale, experts, activations="exact") -> None:
    """Raise ArgumentError unless the arguments fit together."""
    if activations not in ACTIVATIONS:
        raise unknown_key("activations", activations, ACTIVATIONS)
    if x.dim() < 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        accepted = "float32, bfloat16 or float16 [..., in_features]"
        raise ArgumentError("x", arguments.given(x), accepted, "Convert it first.")
    half = padded(x.shape[-1]) // 2
    if codes.dtype != torch.uint8 or codes.dim() != 3 or codes.shape[2] != half:
        accepted = f"uint8 [experts, out_features, {half}] for {x.shape[-1]} input features (padded to 16)"
        raise ArgumentError(
            "codes", arguments.given(codes), accepted, "Stack what nvfp4_quantize gives for each matrix."
        )
    scales = (*codes.shape[:2], half // 8)
    if block_scales.dtype != torch.uint8 or tuple(block_scales.shape) != scales:
        raise ArgumentError("block_scales", arguments.given(block_scales), f"uint8 {scales}, the bytes of float8_e4m3fn",
                            "Stack what nvfp4_quantize gives for each matrix.")  # fmt: skip
    if global_scale.dtype != torch.float32 or tuple(global_scale.shape) != (codes.shape[0],):
        raise ArgumentError(
            "global_scale", arguments.given(global_scale), f"float32 [{codes.shape[0]}]", "One an expert."
        )
    check_experts(x, experts, codes.shape[0])


def _fake(x, codes, block_scales, global_scale, experts, activations="exact"):
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)

    def call(label, rows, count, n, k, activations="exact", experts=None):
        q = [quantize(torch.randn(n, k, generator=make) * 0.02 * (1 + e)) for e in range(count)]
        x = torch.randn(*rows, k, generator=make).to(dtype)
        chosen = routing(rows, count, make) if experts is None else experts
        parts = (
            torch.stack([p.codes for p in q]),
            torch.stack([p.block_scales.view(torch.uint8) for p in q]),
            torch.stack([p.global_scale.reshape(()) for p in q]),
        )
        return Sample(label, (x.to(device), *(p.to(device) for p in parts), chosen.to(device), activations))

    samples = [
        call("a few rows, K not a multiple of 16", (7,), 4, 12, 40),
        call("tokens with two experts each", (20, 2), 3, 24, 64),
        call("every expert on every row", (3, 6), 3, 10, 32, experts=torch.arange(3)[:, None]),
        call("no rows", (0,), 4, 6, 32),
    ]
    if dtype == torch.float32:
        samples.append(call("integer activations", (5,), 3, 12, 48, "int8"))
    return samples


def _plain(x, codes, block_scales, global_scale, experts, activations="exact"):
    which = experts.expand(x.shape[:-1])
    rows, factor = round_activations(x, activations)
    wide = codes[which].int()
    nibbles = torch.stack((wide % 16, wide // 16), -1).flatten(-2)
    size = (nibbles % 8).float()
    found = torch.where(size <= 4, size * 0.5, torch.where(size <= 6, size - 2, 6.0))
    found = torch.where(nibbles < 8, found, -found).unflatten(-1, (-1, 16))
    weight = (found * decode_e4m3(block_scales[which])[..., None]).flatten(-2)
    y = (weight @ rows.unsqueeze(-1)).squeeze(-1)
    return (y * (global_scale[which] * factor).unsqueeze(-1)).to(x.dtype)


def _price(model, node):
    mode = node.args[5] if len(node.args) > 5 else node.kwargs.get("activations", "exact")
    return price(model, node, f"nvfp4_linear.{mode}", 4.5)


@define(
    "nvfp4_expert_linear(Tensor x, Tensor codes, Tensor block_scales, Tensor global_scale, Tensor experts, "
    'str activations="exact") -> Tensor',
    fake=_fake,
    inputs=_samples,
    # as nvfp4_linear: another order of summation, and at most one unit of the output's last place
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    providers=("cpu_cpp", "each_expert"),
    price=_price,
    tokens=each_row,
    plain=Plain(run=_plain, says=MEMORY),
    check=check,
)
def nvfp4_expert_linear(x, codes, block_scales, global_scale, experts, activations="exact"):
    """x [..., K]; codes uint8 [E, N, 8B], block_scales uint8 [E, N, B], global_scale fp32 [E]: what `nvfp4_quantize`
    gives for each matrix, stacked. experts int [...]: whose matrix a row is multiplied by. Returns [..., N]."""

    def product(e: int, rows: torch.Tensor) -> torch.Tensor:
        return nvfp4_linear.reference(
            rows, codes[e], block_scales[e], global_scale[e], None, None, activations
        )

    return by_expert(x, experts, codes.shape[0], codes.shape[1], product)


def _in_place(x, codes, block_scales, global_scale, experts, activations="exact"):
    for name, tensor in (("codes", codes), ("block_scales", block_scales)):
        if not tensor.is_contiguous():
            return f"{name} is not contiguous; the kernel reads it in place and would have to copy it."
    return None


@nvfp4_expert_linear.provider(
    "cpu_cpp", device="cpu", supported=nvfp4_cpu.unavailable, supports_args=_in_place
)
def _cpu(x, codes, block_scales, global_scale, experts, activations="exact"):
    """The kernel of `nvfp4_linear` for the rows of each expert that has some; the others' codes are not read."""

    def product(e: int, rows: torch.Tensor) -> torch.Tensor:
        return nvfp4_cpu.linear(rows, codes[e], block_scales[e], global_scale[e], None, activations).to(
            x.dtype
        )

    return by_expert(x, experts, codes.shape[0], codes.shape[1], product)


@nvfp4_expert_linear.provider("each_expert", device="cuda")
def _each(x, codes, block_scales, global_scale, experts, activations="exact"):
    """A call of `nvfp4_linear`'s own kernels for each expert that has rows. Waits for the device, to count these."""

    def product(e: int, rows: torch.Tensor) -> torch.Tensor:
        parts = (codes[e], block_scales[e], global_scale[e])
        return torch.ops.thresher.nvfp4_linear(rows, *parts, None, None, activations)

    return by_expert(x, experts, codes.shape[0], codes.shape[1], product)
