"""Where every matrix of a model stands after a pass that rewrites weights: rewritten, left alone, or no product's.

A site is what a matcher saw. What it did not see, such as the experts of a mixture, is found here, by following every
stored weight of two or more dimensions to the operators that multiply by it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from thresher.graph.nodes import sequence_of
from thresher.graph.program import Program
from thresher.report import Miss

from .structure.linears import PRODUCTS, find_linears
from .structure.pattern import CASTS
from .structure.views import VIEWS

aten = torch.ops.aten

_CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
)
_PRODUCTS = {*PRODUCTS, aten.bmm.default, aten.baddbmm.default, aten.einsum.default, aten.bilinear.default}
_THROUGH = {
    *VIEWS, *CASTS, aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default, aten.expand.default,
    aten.select.int, aten.slice.Tensor, aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.index_select.default, aten.index.Tensor, aten.clone.default, operator.getitem,
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """One stored weight of two or more dimensions. shape, size: its own, size in bytes. product: what multiplies by it,
    in words; None where nothing does, and `use` then names what reads it instead."""

    fqn: str
    shape: tuple[int, ...]
    size: int
    product: str | None
    use: str

    @property
    def site(self) -> str:
        return self.fqn.removesuffix(".weight")

    @property
    def miss(self) -> Miss:
        """Why no pass that rewrites linears found it."""
        shape = f"{' x '.join(map(str, self.shape))} = {_count(self.shape)} weights"
        if self.product is None:
            return Miss(self.site, f"Its {shape} are read by {self.use}, and no product multiplies by them.")
        if len(self.shape) == 3 and "conv" not in self.product:
            return Miss(self.site, f"Its {shape} are {self.shape[0]} matrices in one, as of experts, multiplied by "
                                   f"{self.product} in a way that is not recovered as a product by experts.")  # fmt: skip
        return Miss(self.site, f"Its {shape} are multiplied by {self.product}, which is no linear layer "
                               "(x times a stored matrix of two dimensions).")  # fmt: skip


def _count(shape: Iterable[int]) -> int:
    return int(torch.Size(shape).numel())


def matrices(program: Program) -> list[Matrix]:
    """Every floating-point weight of the model's own with two or more dimensions, in the order the graph reads them."""
    linear = {s.weight for s in find_linears(program)[0]}
    found = []
    for node in program.graph.nodes:
        held = program.weight(node)
        if held is None or held.source or held.tensor.dim() < 2 or not held.tensor.is_floating_point():
            continue
        if held.fqn.startswith("constant."):
            continue
        product, use = _reader(program, node)
        if str(node.target) in linear:
            product = "linear"
        tensor = held.tensor
        found.append(
            Matrix(held.fqn, tuple(tensor.shape), tensor.numel() * tensor.element_size(), product, use)
        )
    return found


def _reader(program: Program, weight: fx.Node) -> tuple[str | None, str]:
    """The operator that multiplies by a weight, or None, and the first one that reads it."""
    stack, seen, use = [(weight, False)], {weight}, "nothing"
    while stack:
        node, picked = stack.pop()
        for user in node.users:
            if user.op != "call_function" or user in seen:
                continue
            name = getattr(user.target, "__name__", str(user.target)).split(".")[0]
            full = str(user.target).removesuffix(".default")
            if (
                user.target in _PRODUCTS
                or name in _CONVOLUTIONS
                or "grouped_mm" in name
                or name == "expert_linear"
            ):
                others = [a for a in user.all_input_nodes if a is not node]
                looked_up = picked and any(program.weight(a) is not None for a in others)
                if not looked_up:  # rows of a table times another weight are that one's product
                    return full, full
            if user.target in _THROUGH and (not sequence_of(user.args[1:2]) or node is user.args[0]):
                seen.add(user)
                stack.append((user, picked or user.target in (aten.index.Tensor, aten.index_select.default)))
            elif use == "nothing":
                use = full
    return None, use


@dataclass(frozen=True)
class Account:
    """rewritten, missed: bytes of matrices that products multiply by. left: a Miss for each matrix that no site of the
    pass stands for. apart: a Miss for each that no product multiplies by; these do not count."""

    rewritten: int
    missed: int
    left: list[Miss]
    apart: list[Miss]


def account(
    known: Iterable[Matrix],
    sites: Mapping[str, Collection[str]],
    claimed: Collection[str],
    missed: Collection[str],
) -> Account:
    """What a pass did with the matrices of the captured program.

    sites: the weights of each site that matchers know. claimed: weights that were rewritten. missed: sites with a Miss.
    """
    said = {fqn for site in missed for fqn in sites.get(site, ())} | set(missed)
    rewritten = total = 0
    left, apart = [], []
    for matrix in known:
        if matrix.product is None:
            apart.append(matrix.miss)
            continue
        total += matrix.size
        if matrix.fqn in claimed:
            rewritten += matrix.size
        elif not {matrix.fqn, matrix.site} & said:
            left.append(matrix.miss)
    return Account(rewritten, total - rewritten, left, apart)
