"""A mixture's experts in vLLM on a CPU, from weight-only integers of 2, 3, 4 or 8 bits: `thresher::wna16_expert_linear`.

vLLM finds the checkpoint's tensors, cuts them over ranks, routes tokens and adds shared experts. What is here holds
a layer's codes and multiplies each token by those of its own experts only; codes of experts without tokens are not read.
On a GPU experts are vLLM's own, which has kernels for them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as theirs,
)

from thresher.formats import bitpack
from thresher.kernels import catalog

from ..errors import ThresherError

catalog.load()
ops = torch.ops.thresher
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
"""Of a gate, times what goes up: those that need no more than the two halves of a product."""


class LowBitExperts(theirs.CompressedTensorsWNA16MoEMethod):
    """How one layer of experts is held and computed; tensors are registered, and loaded, as vLLM's own method does.

    weights: the checkpoint's `weights` of these linears. Raises ThresherError for a layer that it does not compute.
    """

    def __init__(self, weights: Any, moe: Any, name: str):
        FusedMoEMethodBase.__init__(self, moe)  # vLLM's own looks for a kernel of its own
        self.weight_quant, self.input_quant = weights, None
        self.symmetric, self.num_bits, self.strategy = weights.symmetric, weights.num_bits, weights.strategy
        self.packed_factor, self.group_size = Fraction(32, weights.num_bits), weights.group_size or -1
        self.name = name
        activation = str(getattr(moe.activation, "value", moe.activation))
        for wrong, what in (
            (moe.has_bias, "have biases"),
            (activation not in _ACTIVATIONS, f"use the activation {activation}"),
            (any(getattr(moe, n, None) is not None for n in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")),
             "clamp or scale what their activation is given"),
        ):  # fmt: skip
            if wrong:
                raise ThresherError(
                    f"quantization: the experts of {name} {what}, and Thresher's operators on a CPU do not compute that. "
                    'Serve it without quantization="thresher", or on a GPU by vLLM\'s own kernels.'
                )

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        unit = 32 // math.gcd(32, self.num_bits)
        for inputs in (hidden_size, intermediate_size_per_partition):
            if inputs % unit or (self.group_size > 0 and inputs % self.group_size):
                raise ThresherError(
                    f"tensor_parallel_size: a rank's {inputs} inputs of the experts of {self.name} are no multiple of "
                    f"{unit} codes, which fill whole words, and of the group size {self.group_size}. Use fewer ranks."
                )
        super().create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **more
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Plain tensors, zero points a byte each."""
        held: Any = layer
        for part in ("w13", "w2"):
            packed = getattr(held, f"{part}_weight_packed").data.contiguous()
            zeros = None
            if not self.symmetric:
                given = getattr(held, f"{part}_weight_zero_point").data.transpose(1, 2).contiguous()
                zeros = bitpack.unpack(given, self.num_bits, packed.shape[1]).transpose(1, 2).contiguous()
                delattr(held, f"{part}_weight_zero_point")
            setattr(held, f"{part}_zeros", zeros)
            delattr(held, f"{part}_weight_shape")

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> torch.Tensor:
        """[tokens, hidden] of x [tokens, hidden], by experts topk_ids [tokens, k] with weights [tokens, k]."""
        ids, shares = topk_ids.long(), topk_weights
        if layer.expert_map is not None:  # the experts of other ranks have no number here
            ids = layer.expert_map.long()[ids]
            shares, ids = shares.masked_fill(ids < 0, 0), ids.clamp(min=0)
        if layer.apply_router_weight_on_input:
            x, shares = x * shares.to(x.dtype), (shares != 0).to(shares.dtype)
        rows = x[:, None].expand(-1, ids.shape[1], -1)
        both = self._product(layer, "w13", rows, ids)
        made = both.new_empty(*ids.shape, both.shape[-1] // 2)
        apply_moe_activation(layer.activation, made.flatten(0, 1), both.flatten(0, 1))
        found = self._product(layer, "w2", made, ids)
        return (found * shares[..., None].to(found.dtype)).sum(1)

    def _product(self, layer: Any, part: str, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        codes, scales = getattr(layer, f"{part}_weight_packed"), getattr(layer, f"{part}_weight_scale")
        zeros = getattr(layer, f"{part}_zeros")
        return ops.wna16_expert_linear(x, codes, scales, zeros, ids, self.num_bits, self.group_size)
