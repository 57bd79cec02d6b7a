"""The MLPs of a model: where they are, and what their down projections read as forward passes run.

They are found by the same structure recovery as the rewrite uses, on a copy of the model without storage, so any
unmodified model works, and one wrapped in PEFT adapters: their low-rank branches are switched off in that copy.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thresher.passes.deft.sites import site_names, widest
from thresher.passes.structure.recover import recover

from ..errors import ArgumentError, ThresherError
from ..graph.nodes import module_fqn
from ..model_capture import exported

_PACKED = (torch.uint8, torch.int8, torch.int32)


@dataclass(frozen=True)
class Mlp:
    """One MLP of a model. down: FQN of its last linear's module. activation: its name.

    activation_module: FQN of the module that computes the activation. width: neurons.
    """

    fqn: str
    down: str
    activation: str
    activation_module: str
    width: int


def mlps(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> list[Mlp]:
    """The MLPs of a model, in the order they run; a module that runs twice is named once.

    example_inputs: keyword arguments of one forward pass; a Hugging Face model brings its own.
    """
    inputs = example_inputs if example_inputs is not None else getattr(model, "dummy_inputs", None)
    if inputs is None:
        raise ArgumentError(
            "example_inputs", None, "a dict of keyword arguments of one forward pass",
            "This model has no dummy_inputs of its own; pass a batch.",
        )  # fmt: skip
    shadow = _without_storage(model)
    given = {k: v.to("meta") for k, v in dict(inputs).items() if isinstance(v, torch.Tensor)}
    given.pop("labels", None)
    if (
        "attention_mask" in inspect.signature(model.forward).parameters and "input_ids" in given
    ):  # without a mask models look for pads by value
        given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    with _adapters_off(shadow):
        program, _ = exported(shadow, (), given)
    structure = recover(program)
    sites, _ = widest(structure.mlps)  # an adapter's linear beside the down projection reads the same value
    # an adapter in a row with the MLP is a narrow one of its own, and its few neurons are there to be used
    sites = [m for m in sites if m.down.in_features >= m.down.out_features] or sites
    found: dict[str, Mlp] = {}
    for m, name in site_names(sites).items():
        down = m.down.weight_fqn.removesuffix(".weight")
        found.setdefault(
            down, Mlp(name, down, m.activation, module_fqn(m.activation_node), m.down.in_features)
        )
    if not found:
        raise ThresherError(
            "No MLP was found in this model: none of its linears feeds an activation and another linear. Adapters "
            "other than LoRA inside an MLP hide it; find the MLPs before wrapping it."
        )
    return list(found.values())


def _without_storage(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors have shapes only; quantized linears become plain ones."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        )
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # a cache among the results is one more thing to trace
        for name, child in list(module.named_children()):
            packed = getattr(child, "weight", None)
            sizes = getattr(child, "in_features", 0), getattr(child, "out_features", 0)
            if hasattr(packed, "quant_state") or (
                isinstance(packed, torch.Tensor) and packed.dtype in _PACKED
            ):
                plain = nn.Linear(*sizes, bias=getattr(child, "bias", None) is not None, device="meta")
                setattr(module, name, plain)
    return shadow.eval()


def _adapters_off(model: nn.Module) -> Any:
    disable = getattr(model, "disable_adapter", None)
    return disable() if callable(disable) else contextlib.nullcontext()


class Watch:
    """Shows the hidden activations of a model's MLPs, with a mask of real tokens, as forward passes run.

    see: called with (site, h [..., F], real: bool of h's leading shape or None).
    """

    def __init__(self, model: nn.Module, sites: Sequence[Mlp], see: Callable[[str, torch.Tensor, Any], None]):
        self._signature = inspect.signature(model.forward)
        self._masks: dict[str, Any] = {}
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for site in sites:
            module = model.get_submodule(site.down)
            self._handles.append(module.register_forward_pre_hook(self._reader(site, see)))

    def begin(self) -> None:
        """A forward pass starts; for subclasses."""

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._signature.parameters, args)) | kwargs
        labels = given.get("labels")
        self._masks = {"": given.get("attention_mask"), "decoder": given.get("decoder_attention_mask")}
        if self._masks["decoder"] is None and isinstance(labels, torch.Tensor):
            self._masks["decoder"] = labels != -100
        self.begin()

    def _reader(self, site: Mlp, see: Callable[[str, torch.Tensor, Any], None]) -> Callable[..., None]:
        of_decoder = "decoder" in site.fqn.split(".")

        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(site.fqn, args[0], self._real(args[0], of_decoder))

        return read

    def _real(self, h: torch.Tensor, of_decoder: bool) -> torch.Tensor | None:
        """The mask that fits, or None. With a cache, the mask is longer than the new tokens: its end counts."""
        wanted = [self._masks.get("decoder")] if of_decoder else []
        for mask in (*wanted, self._masks.get("")):
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or h.dim() < 2:
                continue
            rows, width = h.shape[0], h.shape[1] if h.dim() == 3 else 0
            if h.dim() == 2 and mask.numel() == rows:  # tokens were flattened (OPT before transformers 4.50)
                return mask.reshape(-1).bool()
            if h.dim() == 3 and mask.shape[0] == rows and mask.shape[1] >= width:
                return mask[:, mask.shape[1] - width :].bool()
        return None
