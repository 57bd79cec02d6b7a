"""`thresher::wna16_expert_linear`: each row times its own expert's matrix of 2-, 3-, 4- or 8-bit integers."""

from __future__ import annotations

import torch

from thresher.errors import ArgumentError
from thresher.formats import bitpack
from thresher.graph.nodes import argument
from thresher.ops import Sample, define
from thresher.plain_form import Plain

from .. import arguments, native
from ..wna16 import cpu as wna16_cpu
from ..wna16 import linear as one
from ..wna16.plain import codes_of
from .linear import price, routing
from .rows import MEMORY, by_expert, check_experts, each_row


def check(x, codes, scales, zeros, experts, bits: int, group_size: int) -> None:
    """Raise ArgumentError unless the arguments fit together."""
    given = (("codes", codes), ("scales", scales), ("zeros", zeros))
    for name, tensor in given:
        if tensor is not None and (tensor.dim() != 3 or tensor.shape[0] != codes.shape[0]):
            raise ArgumentError(name, arguments.given(tensor), "three dimensions, experts first",
                                "Stack what wna16_linear takes for each matrix.")  # fmt: skip
    if codes.shape[0] == 0:
        raise ArgumentError("codes", arguments.given(codes), "one expert or more", "Leave the layer out.")
    one.check(x, codes[0], scales[0], None if zeros is None else zeros[0], None, bits, group_size)
    check_experts(x, experts, codes.shape[0])


def _fake(x, codes, scales, zeros, experts, bits, group_size):
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)

    def call(label, rows, count, n, k, bits, group, zeros=False, experts=None):
        parts = 1 if group < 0 else k // group
        codes = torch.randint(0, 1 << bits, (count, n, k), generator=make)
        scales = (torch.rand(count, n, parts, generator=make) + 0.5) / (1 << bits)
        zero = torch.randint(0, 1 << bits, (count, n, parts), generator=make, dtype=torch.uint8)
        chosen = routing(rows, count, make) if experts is None else experts
        args = (
            torch.randn(*rows, k, generator=make).to(device, dtype),
            torch.stack([bitpack.pack(c, bits) for c in codes]).to(device),
            scales.to(device),
            zero.to(device) if zeros else None,
            chosen.to(device),
            bits,
            group,
        )
        return Sample(label, args)

    return [
        call("a few rows, 4 bits", (7,), 4, 12, 64, 4, 32),
        call("tokens with two experts each, 3 bits, zero points", (40, 2), 3, 20, 96, 3, 32, True),
        call(
            "every expert on every row, per channel", (3, 6), 3, 10, 40, 8, -1, True, torch.arange(3)[:, None]
        ),
        call("no rows", (0,), 4, 6, 32, 4, -1),
    ]


def _plain(x, codes, scales, zeros, experts, bits, group_size):
    wide = torch.promote_types(x.dtype, torch.float32)
    which = experts.expand(x.shape[:-1]).reshape(-1)
    outputs, groups, inputs = codes.shape[1], scales.shape[2], x.shape[-1]
    rows = codes[which].reshape(-1, codes.shape[2])
    values = codes_of(rows, bits, inputs).to(wide).reshape(-1, outputs, groups, inputs // groups)
    zero = float(1 << (bits - 1)) if zeros is None else zeros[which].to(wide)[..., None]
    weight = ((values - zero) * scales[which].to(wide)[..., None]).reshape(-1, outputs, inputs)
    out = (weight @ x.reshape(-1, inputs, 1).to(wide)).squeeze(-1)
    return out.reshape(*x.shape[:-1], outputs).to(x.dtype)


def _price(model, node):
    bits = argument(node, "bits")
    return price(model, node, f"wna16_linear.{bits}", bits + 0.5)


@define(
    "wna16_expert_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor experts, int bits, "
    "int group_size) -> Tensor",
    fake=_fake,
    inputs=_samples,
    tolerance=one.TOLERANCE,
    providers=("cpu_cpp", "each_expert"),
    price=_price,
    tokens=each_row,
    plain=Plain(run=_plain, says=MEMORY),
    check=check,
)
def wna16_expert_linear(x, codes, scales, zeros, experts, bits, group_size):
    """x [..., K]; codes int32 [E, N, words(K, bits)], scales [E, N, G], zeros uint8 [E, N, G] or None: what
    `wna16_linear` takes for each matrix, stacked. experts int [...]: whose matrix a row is multiplied by."""

    def product(e: int, rows: torch.Tensor) -> torch.Tensor:
        zero = None if zeros is None else zeros[e]
        return one.wna16_linear.reference(rows, codes[e], scales[e], zero, None, bits, group_size)

    return by_expert(x, experts, codes.shape[0], codes.shape[1], product)


def _accepts(x, codes, scales, zeros, experts, bits, group_size):
    return wna16_cpu.accepts(x, codes, scales, zeros, None, bits, group_size)


@wna16_expert_linear.provider(
    "cpu_cpp", device="cpu", supported=lambda: native.load_error("wna16"), supports_args=_accepts
)
def _cpu(x, codes, scales, zeros, experts, bits, group_size):
    """The kernel of `wna16_linear` for the rows of each expert that has some; the others' codes are not read."""

    def product(e: int, rows: torch.Tensor) -> torch.Tensor:
        zero = None if zeros is None else zeros[e]
        return wna16_cpu.run(rows, codes[e], scales[e], zero, None, bits, group_size)

    return by_expert(x, experts, codes.shape[0], codes.shape[1], product)


@wna16_expert_linear.provider("each_expert", device="cuda")
def _each(x, codes, scales, zeros, experts, bits, group_size):
    """A call of `wna16_linear`'s own kernels for each expert that has rows. Waits for the device, to count these."""

    def product(e: int, rows: torch.Tensor) -> torch.Tensor:
        zero = None if zeros is None else zeros[e]
        return torch.ops.thresher.wna16_linear(rows, codes[e], scales[e], zero, None, bits, group_size)

    return by_expert(x, experts, codes.shape[0], codes.shape[1], product)
