"""Linears that hold low-bit codes under the names of a compressed-tensors checkpoint, and compute by our operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from thresher.formats import bitpack, nvfp4
from thresher.graph.token_labels import TokenAxes, only_first, row_by_row
from thresher.kernels import catalog
from thresher.passes.rsq.quantizer import codes as rsq_codes
from thresher.passes.tokens.labels import rule_of
from thresher.runtime.checkpoints import low_bit

catalog.load()
ops = torch.ops.thresher


@rule_of(ops.wna16_linear.default, ops.nvfp4_linear.default)
def _by_tokens(node: fx.Node, labels: TokenAxes) -> Any:
    """Tokens go through a linear of codes as through any: a program of this model can be packed."""
    only_first(node, labels)
    return row_by_row(node, labels)


class _Coded(nn.Module):
    """What both kinds share. A frozen parameter is what loaders of checkpoints fill."""

    in_features: int
    out_features: int
    weight_packed: nn.Parameter
    weight_scale: nn.Parameter

    def _hold(self, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        self.refresh()

    def refresh(self) -> None:
        """Compute anew what follows from the tensors; after they were loaded."""

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features] in the scales' type: what the codes stand for, computed at each look."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class LowBitLinear(_Coded):
    """A linear of 2-, 3-, 4- or 8-bit integer codes (`thresher::wna16_linear`); see `checkpoints.low_bit`."""

    zeros: torch.Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None,
        bits: int,
        group_size: int,
        in_features: int,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, tensors["weight_packed"].shape[0]
        self.bits, self.group_size = bits, group_size
        self.register_buffer("zeros", None, persistent=False)
        self._hold(tensors, bias)

    @classmethod
    def of(cls, held: low_bit.LowBitLinear) -> LowBitLinear:
        """With these codes."""
        tensors = {k: t for k, t in low_bit.to_compressed_tensors(held).items() if k != "bias"}
        return cls(tensors, held.bias, held.bits, held.group_size, held.in_features)

    @classmethod
    def empty(
        cls, linear: nn.Linear, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
    ) -> LowBitLinear:
        """In the place of a linear whose checkpoint is still to be loaded."""
        rows, columns = linear.out_features, linear.in_features
        groups = 1 if group_size < 0 else columns // group_size
        with torch.device(linear.weight.device):
            tensors = {
                "weight_packed": torch.zeros(rows, bitpack.words(columns, bits), dtype=torch.int32),
                "weight_scale": torch.zeros(rows, groups, dtype=dtype),
                "weight_shape": torch.tensor([rows, columns]),
            }
            if not symmetric:
                tensors["weight_zero_point"] = torch.zeros(
                    bitpack.words(rows, bits), groups, dtype=torch.int32
                )
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(tensors, bias, bits, -1 if groups == 1 else group_size, columns)

    def refresh(self) -> None:
        packed = getattr(self, "weight_zero_point", None)
        if packed is not None and packed.device.type != "meta":
            self.zeros = (
                bitpack.unpack(packed.t().contiguous(), self.bits, self.out_features).t().contiguous()
            )

    @property
    def weight(self) -> torch.Tensor:
        tensors: dict[str, torch.Tensor] = {
            "codes": self.weight_packed, "scales": self.weight_scale,
            "bits": torch.tensor(self.bits), "inputs": torch.tensor(self.in_features),
        }  # fmt: skip
        if self.zeros is not None:
            tensors["zeros"] = self.zeros
        return rsq_codes.values(tensors).to(self.weight_scale.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.wna16_linear(
            x, self.weight_packed, self.weight_scale, self.zeros, self.bias, self.bits, self.group_size
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


class NVFP4Linear(_Coded):
    """A linear in NVFP4 (`thresher::nvfp4_linear`): codes, a scale for each block of 16, and the tensor's."""

    weight_global_scale: nn.Parameter
    global_scale: torch.Tensor

    def __init__(
        self, codes: torch.Tensor, block_scales: torch.Tensor, stored_global: torch.Tensor, bias: Any
    ):
        super().__init__()
        self.in_features, self.out_features = codes.shape[1] * 2, codes.shape[0]
        self.register_buffer("global_scale", torch.ones(()), persistent=False)
        scales = block_scales.view(torch.float8_e4m3fn)
        self._hold(
            {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": stored_global}, bias
        )

    @classmethod
    def empty(cls, linear: nn.Linear) -> NVFP4Linear:
        """In the place of a linear whose checkpoint is still to be loaded."""
        rows, columns = linear.out_features, linear.in_features
        with torch.device(linear.weight.device):
            codes = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            scales = torch.zeros(rows, columns // nvfp4.BLOCK, dtype=torch.uint8)
            whole = torch.ones(1, dtype=torch.float32)  # whatever type a loader makes by default
        return cls(codes, scales, whole, None if linear.bias is None else linear.bias.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> NVFP4Linear:
        """Moved or cast; the scales keep their own types, which the format prescribes."""
        before = {name: getattr(self, name).detach() for name in ("weight_scale", "weight_global_scale")}
        super()._apply(fn, recurse)
        for name, held in before.items():
            now = getattr(self, name)
            if now.dtype != held.dtype:
                setattr(self, name, nn.Parameter(held.to(now.device), requires_grad=False))
        self.refresh()
        return self

    def refresh(self) -> None:
        if self.weight_global_scale.device.type != "meta":
            self.global_scale = self.weight_global_scale.detach().reshape(()).float().reciprocal()

    @property
    def weight(self) -> torch.Tensor:
        scales = self.weight_scale.view(torch.uint8)
        return nvfp4.dequantized(self.weight_packed, scales, self.global_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = self.weight_scale.view(torch.uint8)
        return ops.nvfp4_linear(x, self.weight_packed, scales, self.global_scale, None, self.bias, "exact")


def from_codes(tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> LowBitLinear | NVFP4Linear:
    """The module for what the quantizer made of one linear; see `rsq.quantizer.codes.to_tensors`."""
    if "block_scales" in tensors:
        whole = tensors["global_scale"].reshape(1).reciprocal()
        return NVFP4Linear(tensors["codes"], tensors["block_scales"], whole, bias)
    columns, groups = int(tensors["inputs"]), tensors["scales"].shape[1]
    size = -1 if groups == 1 else columns // groups
    return LowBitLinear.of(
        low_bit.LowBitLinear(
            tensors["codes"],
            tensors["scales"],
            tensors.get("zeros"),
            bias,
            int(tensors["bits"]),
            size,
            columns,
        )
    )
