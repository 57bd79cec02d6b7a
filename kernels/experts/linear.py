"""`thresher::expert_linear`: each row times the matrix of its own expert.

    y[i] = x[i] W[experts[i]]^T            W [E, N, K]: E matrices in one, in any memory layout

It is what a mixture's sort, offsets, grouped product and inverse sort mean, said row by row, so that tokens can be
followed through it (`graph.routed` puts it in their place). Rows may come in any order: the operator brings those of
one expert together itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from thresher.errors import ArgumentError
from thresher.graph.nodes import value
from thresher.ops import Sample, define
from thresher.plain_form import Plain
from thresher.pricing import Prices, dtype_of

from .. import arguments
from .rows import MEMORY, by_expert, check_experts, check_rows, each_row

# fp32: another order of summation. Half types round the result once; a kernel may also round partial sums.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-12}


def check(x, weight, experts) -> None:
    """Raise ArgumentError unless the arguments fit together."""
    check_rows(x)
    if weight.dim() != 3 or weight.dtype != x.dtype or weight.shape[2] != x.shape[-1]:
        accepted = f"{x.dtype} [experts, out_features, {x.shape[-1]}]"
        raise ArgumentError(
            "weight", arguments.given(weight), accepted, "One matrix an expert, in x's dtype."
        )
    check_experts(x, experts, weight.shape[0])


def _fake(x, weight, experts):
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def routing(rows: Sequence[int], count: int, make: torch.Generator) -> torch.Tensor:
    """int64 expert of each row, for samples; the first expert gets none, to leave a gap."""
    return torch.randint(min(1, count - 1), count, tuple(rows), generator=make)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    make = torch.Generator().manual_seed(0)

    def call(label, rows, count, n, k, experts=None, flipped=False):
        x = torch.randn(*rows, k, generator=make).to(device, dtype)
        weight = torch.randn(count, *((k, n) if flipped else (n, k)), generator=make).to(device, dtype)
        chosen = routing(rows, count, make) if experts is None else experts
        return Sample(label, (x, weight.transpose(1, 2) if flipped else weight, chosen.to(device)))

    return [
        call("a few rows", (7,), 4, 12, 20),
        call("tokens with two experts each, stored the other way", (5, 2), 3, 8, 16, flipped=True),
        call("every expert on every row", (4, 6), 4, 10, 8, torch.arange(4)[:, None]),
        call("one row", (1,), 4, 6, 10),
        call("one expert for all", (5,), 3, 6, 10, torch.tensor(1)),
        call("no rows", (0,), 4, 6, 10),
    ]


def price(
    model: Prices, node: fx.Node, kernel: str = "linear", bits: float = 0.0, matrices: int = 1
) -> float:
    """A product that reads the matrices of the experts that have rows. matrices: the argument that has one an expert."""
    x, count = node.args[0], model.size(value(node.args[matrices]).shape[0])
    inputs = model.size(value(x).shape[-1])
    rows = model.numel(x) / max(inputs, 1)
    weights = inputs * model.size(value(node).shape[-1])
    used = min(count, rows) or 1
    return used * model.linear(rows / used, weights, dtype_of(x), kernel, bits=bits)


def _plain(x, weight, experts):
    chosen = weight[experts.expand(x.shape[:-1])]
    return (chosen @ x.unsqueeze(-1)).squeeze(-1)


@define(
    "expert_linear(Tensor x, Tensor weight, Tensor experts) -> Tensor",
    fake=_fake,
    inputs=_samples,
    tolerance=TOLERANCE,
    providers=("cpu_mm", "grouped_mm"),
    price=price,
    tokens=each_row,
    plain=Plain(run=_plain, says=MEMORY),
    check=check,
)
def expert_linear(x, weight, experts):
    """x floating [..., K], weight [E, N, K], experts int [...] (expanded to x's rows): [..., N] in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    count, outputs, _ = weight.shape

    def product(expert: int, rows: torch.Tensor) -> torch.Tensor:
        return (rows.to(wide) @ weight[expert].to(wide).t()).to(x.dtype)

    return by_expert(x, experts, count, outputs, product)


@expert_linear.provider("cpu_mm", device="cpu")
def _cpu(x, weight, experts):
    """The processor's own product for each expert's rows, without widening the matrices."""
    count, outputs, _ = weight.shape
    return by_expert(x, experts, count, outputs, lambda e, rows: torch.mm(rows, weight[e].t()))


def _groupable(x, weight, experts):
    if x.dtype != torch.bfloat16 or x.shape[-1] % 8 or weight.shape[1] % 8:
        return "torch._grouped_mm takes bf16 with sizes that are multiples of 8."
    return None


def _has_grouped() -> str | None:
    if not hasattr(torch, "_grouped_mm"):
        return "This torch has no _grouped_mm."
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return "It needs a GPU of compute capability 8.0."
    return None


@expert_linear.provider("grouped_mm", device="cuda", supported=_has_grouped, supports_args=_groupable)
def _cuda(x, weight, experts):
    """One grouped product of the rows sorted by their experts; nothing waits for the device."""
    which = experts.expand(x.shape[:-1]).reshape(-1)
    order = which.argsort(stable=True)
    numbers = torch.arange(weight.shape[0], device=x.device)
    ends = torch.searchsorted(which[order], numbers, right=True).int()
    sorted_rows = x.reshape(-1, x.shape[-1])[order]
    made = torch._grouped_mm(sorted_rows, weight.transpose(1, 2), offs=ends)
    return torch.empty_like(made).index_copy_(0, order, made).reshape(*x.shape[:-1], weight.shape[1])
