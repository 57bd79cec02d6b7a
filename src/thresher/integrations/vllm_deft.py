"""Sparse MLPs in vLLM: the down projection of a ReLU model reads only the weights of neurons that are not zero.

LLM(model=DIR, quantization="thresher-deft")      # DIR: a model as transformers saves it, such as OPT

vLLM asks for a method linear by linear, so this one stands in a down projection alone (`thresher::sparse_down`): the up
projection has computed every neuron by then. Neurons that are exactly zero are left out and nothing else, which changes
rounding only. Tokens of one step share the neurons that any of them needs; where these are too many for the machine, or the
tokens more than `BMAX` as in a prefill, the product is dense.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..errors import ThresherError

NAME = "thresher-deft"
BMAX = 64
"""Largest number of tokens for which it is looked for neurons that all of them leave out."""
_ACTIVATIONS = ("activation_function", "hidden_act", "hidden_activation", "ffn_act")
_ZERO_BELOW_ZERO = ("relu", "relu2", "relu_squared", "squared_relu")


class ThresherDeft(QuantizationConfig):
    """Weights as they are, and sparse down projections of ReLU MLPs."""

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of a GPU; a CPU has none

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ThresherDeft:
        raise ThresherError(
            f'quantization: "{NAME}" runs a model whose weights are not quantized, and this one\'s are '
            f"({config.get('quant_method', 'by an unknown method')}). Leave quantization= out."
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """A sparse product for the down projection of an MLP, and vLLM's own for every other linear.

        Raises ThresherError for a model whose activation is not zero for any neuron.
        """
        if not isinstance(layer, LinearBase):
            return None
        if (
            not isinstance(layer, RowParallelLinear) or "att" in prefix
        ):  # what else reads columns is an MLP's end
            return UnquantizedLinearMethod()
        config = get_current_vllm_config().model_config.hf_text_config
        named = next((str(getattr(config, n)) for n in _ACTIVATIONS if getattr(config, n, None)), "unknown")
        if named not in _ZERO_BELOW_ZERO:
            raise ThresherError(
                f'quantization: "{NAME}" gains from neurons that are exactly zero, and the MLPs of this model use '
                f"{named}. Leave it out, or serve a model with ReLU."
            )
        return SparseDown(prefix)


class SparseDown(UnquantizedLinearMethod):
    """A linear whose weight is held neuron by neuron, [inputs, outputs]."""

    def __init__(self, site: str):
        super().__init__()
        self.site = site

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        held: Any = layer
        held.weight = torch.nn.Parameter(held.weight.data.t().contiguous(), requires_grad=False)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        held: Any = layer
        return torch.ops.thresher.sparse_down(x, held.weight, None, bias, None, -1.0, BMAX, self.site)
