"""transformers' own loader with our operators: `quantization_config=ThresherConfig(...)`.

from thresher.integrations.transformers import ThresherConfig, from_pretrained
model = AutoModelForCausalLM.from_pretrained(DIR, quantization_config=ThresherConfig(bits=4, data=texts, tokenizer=t))
model.save_pretrained(OUT)       # compressed-tensors, which transformers and vLLM load without Thresher
model = from_pretrained(OUT)     # with our operators in the place of its linears
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ArgumentError, unknown_key
from ..low_bit.checkpoint import METHOD, describe, prepare
from ..low_bit.linear import LowBitLinear, NVFP4Linear
from ..quantization import RSQ, Quantized, quantize

NAME = "thresher"
_TEXT = ("sequences", "length", "batch_size", "seed")


@register_quantization_config(NAME)
class ThresherConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model by RSQ while it loads it, or that it loads a quantized one.

    options: those of `thresher.RSQ` (bits, group_size, grid, ...), and `sequences`, `length`, `batch_size`, `seed` of
        `thresher.quantize`. data, tokenizer: what to calibrate on, as there; the tokenizer may be left out for token
        ids, and for text where the model's directory holds one.
    checkpoint: a compressed-tensors `quantization_config` of files that are quantized already; then nothing else.
    """

    def __init__(
        self,
        data: Any = None,
        tokenizer: Any = None,
        *,
        checkpoint: dict[str, Any] | None = None,
        **options: Any,
    ):
        options.pop("quant_method", None)
        known = {f.name for f in dataclasses.fields(RSQ)} | set(_TEXT)
        for key in options:
            if key not in known:
                raise unknown_key("ThresherConfig", key, known)
        if checkpoint is not None and (options or data is not None):
            raise ArgumentError(
                "checkpoint", "a quantized model's description with options of quantizing", "one of both",
                "Leave the options out.",
            )  # fmt: skip
        self.quant_method: Any = NAME
        self.data, self.tokenizer, self.checkpoint, self.options = data, tokenizer, checkpoint, options
        self.written: dict[str, Any] | None = checkpoint  # what config.json is to say
        RSQ(**{k: v for k, v in options.items() if k not in _TEXT}).validate()

    def to_dict(self) -> dict[str, Any]:
        """What a saved config says: of a quantized model compressed-tensors' description, which others read too."""
        return dict(self.written) if self.written is not None else {"quant_method": NAME, **self.options}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def quantized(self, model: Any) -> Quantized:
        """The model quantized by these options."""
        text = {k: v for k, v in self.options.items() if k in _TEXT}
        recipe = RSQ(**{k: v for k, v in self.options.items() if k not in _TEXT})
        tokenizer = self.tokenizer
        if tokenizer is None and (self.data is None or not _is_tokens(self.data)):
            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        return quantize(model, self.data, recipe, tokenizer=tokenizer, portable=True, **text)


def _is_tokens(data: Any) -> bool:
    return isinstance(data, torch.Tensor) or not any(isinstance(d, str) for d in data)


@register_quantizer(NAME)
class ThresherQuantizer(HfQuantizer):
    """What transformers calls around the loading of weights."""

    requires_calibration = False
    quantization_config: ThresherConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        if config.checkpoint is not None:
            prepare(model, config.checkpoint, model.dtype)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        if config.checkpoint is None:
            model.eval()
            made: Any = config.quantized(model).as_model()
            model.__dict__.update(made.__dict__)  # the same object, as the loader holds it
            model.config.quantization_config = config
            config.written = describe(model)
            config.data = config.tokenizer = None
        for module in model.modules():
            if isinstance(module, (LowBitLinear, NVFP4Linear)):
                module.refresh()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def from_pretrained(path: str | Path, kind: Any = None, **given: Any) -> Any:
    """A quantized directory's model with our operators; in eval mode.

    path: as `Quantized.save_pretrained` or another tool wrote it: compressed-tensors with int weights of 2, 3, 4 or 8
        bits or NVFP4, and activations as they are. kind: the class to load, by default the one its config names.
        given: as for transformers' from_pretrained.

    Raises ArgumentError for a directory that is not quantized so.
    """
    import transformers

    config: PretrainedConfig = copy.deepcopy(AutoConfig.from_pretrained(path))
    stated = getattr(config, "quantization_config", None)
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        method = stated.get("quant_method") if isinstance(stated, dict) else "no quantization"
        raise ArgumentError("path", f"{str(path)!r} with {method}", f"a directory with {METHOD} weights",
                            "Write it by thresher.quantize(...).save_pretrained.")  # fmt: skip
    del config.quantization_config
    if kind is None:
        names = [n for n in config.architectures or () if hasattr(transformers, n)]
        kind = getattr(transformers, names[0]) if names else transformers.AutoModel
    chosen = ThresherConfig(checkpoint=stated)
    return kind.from_pretrained(path, config=config, quantization_config=chosen, **given).eval()
