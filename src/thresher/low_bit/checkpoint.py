"""compressed-tensors' description of a quantized model, as transformers and vLLM read it in config.json."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thresher.graph.program import Program
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.rsq import HEADER

from ..errors import ArgumentError
from .fuse import fuse
from .linear import LowBitLinear, NVFP4Linear

METHOD = "compressed-tensors"
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


def describe(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears hold codes. Raises ArgumentError for one without any."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    plain = []
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            groups.setdefault(
                (module.bits, module.group_size, not hasattr(module, "weight_zero_point")), []
            ).append(name)
        elif isinstance(module, NVFP4Linear):
            groups.setdefault(("nvfp4",), []).append(name)
        elif isinstance(module, nn.Linear):
            plain.append(name)
    if not groups:
        raise ArgumentError(
            "model",
            f"{type(model).__name__} without a quantized linear",
            "a quantized one",
            "Quantize it first.",
        )
    formats = {"nvfp4-pack-quantized" if kind[0] == "nvfp4" else "pack-quantized" for kind in groups}
    assert len(formats) == 1, "one quantization has one grid"
    single = len(groups) == 1
    return {
        "quant_method": METHOD,
        "format": next(iter(formats)),
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if single else names, "weights": _weights(kind)}
            for i, (kind, names) in enumerate(groups.items())
        },
        "ignore": plain,
        "thresher": {},  # others skip what they do not know; by it our plugin of vLLM knows its files
    }


def _weights(kind: tuple[Any, ...]) -> dict[str, Any]:
    if kind[0] == "nvfp4":
        return dict(_NVFP4)
    bits, group, symmetric = kind
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group < 0 else "group",
        "group_size": None if group < 0 else group,
    }


def prepare(model: nn.Module, description: Mapping[str, Any], dtype: torch.dtype) -> list[str]:
    """Put empty linears of ours in the places that a checkpoint's description names; the names of these.

    dtype: that scales are loaded in. Raises ArgumentError for a description of what our operators do not compute.
    """
    found: list[str] = []
    for group in description["config_groups"].values():
        weights, targets = group["weights"], group["targets"]
        if group.get("input_activations") is not None:
            raise ArgumentError(
                "quantization_config", "quantized activations", "quantized weights alone",
                "Load it without ThresherConfig.",
            )  # fmt: skip
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear or not _named(name, targets, description.get("ignore") or ()):
                continue
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _empty(module, weights, dtype))
            found.append(name)
    return found


def _named(name: str, targets: Any, ignored: Any) -> bool:
    import re

    def meant(words: Any) -> bool:
        return any(
            re.match(w[3:], name) is not None if w.startswith("re:") else w in (name, "Linear") for w in words
        )

    return meant(targets) and not meant(ignored)


def _empty(linear: nn.Linear, weights: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    kind, bits = weights.get("type", "int"), weights["num_bits"]
    if kind == "float" and bits == 4 and weights.get("group_size") == 16:
        return NVFP4Linear.empty(linear)
    if kind != "int" or bits not in (2, 3, 4, 8) or weights.get("actorder") in ("group", True):
        raise ArgumentError("quantization_config", f"{bits}-bit {kind} weights", "int of 2, 3, 4 or 8 bits, or NVFP4",
                            "Load it without ThresherConfig.")  # fmt: skip
    return LowBitLinear.empty(
        linear, bits, weights.get("group_size") or -1, bool(weights.get("symmetric", True)), dtype
    )


def with_codes(
    model: Any,
    program: Program,
    config: RSQConfig,
    codes: Mapping[str, Mapping[str, torch.Tensor]],
    shared: bool = False,
) -> Any:
    """A copy of a transformers model with the codes in it, described in its config; see `fuse` for the arguments.

    shared: what stays as it is are the model's own tensors, which need not fit into memory twice.
    """
    own = [*model.parameters(), *model.buffers()] if shared else []
    made = copy.deepcopy(model, {id(t): t for t in own})
    fuse(made, program, config, {name: t for name, t in codes.items() if name != HEADER})
    made.config.quantization_config = describe(made)
    return made


def write(made: Any, folder: str | Path, tokenizer: Any) -> Path:
    """The files of a model with codes: weights, config, and the tokenizer where there is one."""
    made.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)


def push(made: Any, tokenizer: Any, repo_id: str, private: bool | None, token: str | None) -> str:
    """The same to a repository of the Hugging Face hub, made if need be; its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        write(made, folder, tokenizer)
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Quantized with Thresher")
    return url
