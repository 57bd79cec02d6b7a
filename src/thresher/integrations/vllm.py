"""vLLM runs a Thresher checkpoint's linears by Thresher's operators; an installed plugin, found by vLLM itself.

from vllm import LLM
LLM(model=DIR)                             # DIR: what thresher.quantize(...).save_pretrained wrote
LLM(model=DIR, quantization="thresher")    # any compressed-tensors checkpoint of 2-, 3-, 4-, 8-bit or NVFP4 weights

vLLM reads compressed-tensors itself and goes on doing so: which layer has which format, fused projections, and the
cutting of weights over tensor- and pipeline-parallel ranks are its own. What is registered here is what holds a
layer's codes and multiplies by them. Layers in other formats are left to vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)
from vllm.platforms import current_platform

from thresher.formats import bitpack, nvfp4
from thresher.kernels import catalog
from thresher.kernels.wna16.linear import wna16_linear

from ..errors import ThresherError
from ..op import Op
from . import vllm_deft, vllm_experts

NAME = "thresher"
_BITS = (2, 3, 4, 8)
ops = torch.ops.thresher


def register() -> None:
    """What vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""
    catalog.load()
    register_quantization_config(NAME)(ThresherQuantization)
    register_quantization_config(vllm_deft.NAME)(vllm_deft.ThresherDeft)


class ThresherQuantization(CompressedTensorsConfig):
    """compressed-tensors with Thresher's operators for weight-only integers and NVFP4."""

    def get_name(self) -> Any:
        return NAME

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Thresher's own checkpoints, and others where the user names this method."""
        readable = hf_quant_cfg.get("quant_method") == "compressed-tensors"
        return NAME if readable and (user_quant == NAME or NAME in hf_quant_cfg) else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts) and current_platform.is_cpu():
            weights = self._experts_weights(layer, prefix)
            if weights is not None:
                return vllm_experts.LowBitExperts(weights, layer.moe_config, prefix)
        return super().get_quant_method(layer, prefix)

    def _experts_weights(self, layer: Any, prefix: str) -> Any:
        """How the weights of a layer's experts are held, or None where that is not as one kind of integers alone."""
        self._add_fused_moe_to_target_scheme_map()
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        first, *others = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") or {} for name in names]
        weights = first.get("weights")
        whole = (
            weights is not None and first.get("input_activations") is None and all(o == first for o in others)
        )
        return weights if whole and _integers(weights) else None

    def get_scheme(self, layer: torch.nn.Module, layer_name: str | None = None) -> Any:
        found = self.get_scheme_dict(layer, layer_name) or {}
        weights = found.get("weights")
        if weights is None or found.get("input_activations") is not None:
            return super().get_scheme(layer, layer_name)
        if _integers(weights):
            return LowBit(weights.num_bits, weights.group_size or -1, weights.symmetric, str(layer_name))
        if (
            str(weights.type).endswith("float")
            and weights.num_bits == 4
            and weights.group_size == nvfp4.BLOCK
        ):
            return NVFP4(str(layer_name))
        return super().get_scheme(layer, layer_name)


def _integers(weights: Any) -> bool:
    """Whether codes are integers that our operators read."""
    by_group = str(weights.strategy).endswith(("group", "channel"))
    return str(weights.type).endswith("int") and weights.num_bits in _BITS and by_group


class _Scheme(CompressedTensorsScheme):
    """What both schemes share."""

    def __init__(self, name: str):
        self.name = name

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of a GPU; a CPU has none

    def _whole(self, inputs: int, unit: int, what: str) -> None:
        """A rank's part of a row must be made of whole groups and words."""
        if inputs % unit:
            raise ThresherError(
                f"tensor_parallel_size: a rank's {inputs} inputs of {self.name} are no multiple of {what} ({unit}). "
                "Use fewer ranks, or quantize with a smaller group_size."
            )


class LowBit(_Scheme):
    """Integer codes of 2, 3, 4 or 8 bits: `thresher::wna16_linear`."""

    def __init__(self, bits: int, group_size: int, symmetric: bool, name: str):
        super().__init__(name)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **_: Any,
    ) -> None:
        rows, inputs, load = (
            sum(output_partition_sizes),
            input_size_per_partition,
            {"weight_loader": weight_loader},
        )
        packed = {"packed_factor": Fraction(32, self.bits), "input_dim": 1, "output_dim": 0, **load}
        if inputs != input_size:
            self._whole(inputs, 32 // math.gcd(32, self.bits), "the codes that fill whole words")
        codes = torch.empty(rows, bitpack.words(inputs, self.bits), dtype=torch.int32)
        layer.register_parameter("weight_packed", PackedvLLMParameter(data=codes, packed_dim=1, **packed))
        shape = torch.empty(2, dtype=torch.int64)
        layer.register_parameter("weight_shape", BasevLLMParameter(data=shape, **load))
        if self.group_size < 0:
            scales = torch.empty(rows, 1, dtype=params_dtype)
            scale: torch.nn.Parameter = ChannelQuantScaleParameter(data=scales, output_dim=0, **load)
        else:
            self._whole(inputs, self.group_size, "the group size")
            scales = torch.empty(rows, inputs // self.group_size, dtype=params_dtype)
            scale = GroupQuantScaleParameter(data=scales, output_dim=0, input_dim=1, **load)
        layer.register_parameter("weight_scale", scale)
        if not self.symmetric:
            zeros = torch.empty(bitpack.words(rows, self.bits), scales.shape[1], dtype=torch.int32)
            layer.register_parameter(
                "weight_zero_point", PackedvLLMParameter(data=zeros, packed_dim=0, **packed)
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Plain tensors in the operator's order; the shape is not needed any more."""
        held: Any = layer
        del held.weight_shape
        held.weight_packed = _frozen(held.weight_packed.data.contiguous())
        held.weight_scale = _frozen(held.weight_scale.data.contiguous())
        held.zeros = None
        if not self.symmetric:
            packed = held.weight_zero_point.data.t().contiguous()
            held.zeros = bitpack.unpack(packed, self.bits, held.weight_packed.shape[0]).t().contiguous()
            del held.weight_zero_point
        x = held.weight_scale.new_empty(1, held.input_size_per_partition)
        held.product = _chosen(
            wna16_linear,
            x,
            held.weight_packed,
            held.weight_scale,
            held.zeros,
            None,
            self.bits,
            self.group_size,
        )

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        held: Any = layer
        product = ops.wna16_linear if torch.compiler.is_compiling() else held.product
        return product(x, held.weight_packed, held.weight_scale, held.zeros, bias, self.bits, self.group_size)


class NVFP4(_Scheme):
    """4-bit floats with a scale for each block of 16 and one for each fused projection: `thresher::nvfp4_linear`."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        weight_loader: Callable[..., Any],
        **_: Any,
    ) -> None:
        rows, inputs, load = (
            sum(output_partition_sizes),
            input_size_per_partition,
            {"weight_loader": weight_loader},
        )
        self._whole(inputs, nvfp4.BLOCK, "the block size")
        held: Any = layer
        held.parts = list(output_partition_sizes)
        grid = {"input_dim": 1, "output_dim": 0, **load}
        codes = torch.empty(rows, inputs // 2, dtype=torch.uint8)
        scales = torch.empty(rows, inputs // nvfp4.BLOCK, dtype=torch.float8_e4m3fn)
        whole = torch.empty(len(output_partition_sizes), dtype=torch.float32)
        layer.register_parameter("weight_packed", ModelWeightParameter(data=codes, **grid))
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=scales, **grid))
        layer.register_parameter("weight_global_scale", PerTensorScaleParameter(data=whole, **load))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The file divides by its scale of a whole tensor; the operator multiplies."""
        held: Any = layer
        held.weight_packed = _frozen(held.weight_packed.data.contiguous())
        held.weight_scale = _frozen(held.weight_scale.data.contiguous().view(torch.uint8))
        whole = held.weight_global_scale.data.reciprocal()
        if bool((whole == whole[0]).all()):
            held.parts, whole = [sum(held.parts)], whole[:1]
        held.weight_global_scale = _frozen(whole)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        held: Any = layer
        results, first = [], 0
        for scale, rows in zip(held.weight_global_scale.unbind(), held.parts, strict=True):
            part = slice(first, first + rows)
            results.append(
                ops.nvfp4_linear(
                    x,
                    held.weight_packed[part],
                    held.weight_scale[part],
                    scale,
                    None,
                    None if bias is None else bias[part],
                    "exact",
                )
            )
            first += rows
        return results[0] if len(results) == 1 else torch.cat(results, -1)


def _chosen(op: Op, *args: Any) -> Callable[..., torch.Tensor]:
    """What multiplies in calls such as this one, checked once: a step of a small model is hundreds of calls, and each costs
    as much to dispatch as a small product. On a GPU the kernel depends on the number of rows, and is chosen at each call."""
    if args[0].device.type != "cpu" or op.check is None:
        return op.overload
    op.check(*args)
    return op.choose(*args)[0].run


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
