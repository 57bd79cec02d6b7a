"""Finds the layers of a decoder, tells whether they are alike, and makes a copy of the model that has few of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..graph.deepen import Layers

KEPT = 3  # the first, whose place is its own, and two that must be the same
LEAST = 6  # layers below which a short model saves little
_OF_MODULES = frozenset(vars(torch.nn.Module()))
_HOOKS = tuple(
    name for name in _OF_MODULES if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Stack:
    """A decoder's layers. path: modules from the model to the list of layers, by name. modules: the layers."""

    path: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...]

    @property
    def layers(self) -> Layers:
        return Layers(".".join(self.path), KEPT, len(self.modules))


def stack_of(model: Any) -> Stack | None:
    """The layers of a decoder of transformers whose layers are all alike; None for any other model."""
    config = getattr(model, "config", None)
    if not callable(getattr(model, "get_decoder", None)) or getattr(config, "is_encoder_decoder", True):
        return None
    decoder = model.get_decoder()
    modules = getattr(decoder, "layers", None)
    if not isinstance(modules, torch.nn.ModuleList) or len(modules) < LEAST:
        return None
    if getattr(decoder, "config", None) is not config or config.num_hidden_layers != len(modules):
        return None
    if len(set(getattr(config, "layer_types", None) or [""])) != 1:
        return None
    name = next((n for n, m in model.named_modules() if m is decoder), None)
    if name is None or not alike(modules):
        return None
    return Stack((*name.split("."), "layers") if name else ("layers",), tuple(modules))


def alike(layers: Sequence[torch.nn.Module]) -> bool:
    """Whether layers differ in nothing but their weights' values, which each has for itself, and their number."""
    facts = [_facts(layer) for layer in layers]
    first = facts[0]
    if first is None:
        return False
    for index, found in enumerate(facts):
        if found is None or found.keys() != first.keys():
            return False
        if not all(_equal(first[k], v, index) for k, v in found.items()):
            return False
    tensors = [id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    return len(set(tensors)) == len(tensors)


def _facts(layer: torch.nn.Module) -> dict[Any, Any] | None:
    """All that a layer is but for its weights' values; None for one with hooks, or tensors that are no plain ones."""
    facts: dict[Any, Any] = {}
    for name, module in layer.named_modules():
        held = vars(module)
        if any(held.get(hooks) for hooks in _HOOKS):
            return None
        facts[name] = type(module)
        for kind in ("_parameters", "_buffers"):
            for key, tensor in held[kind].items():
                if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                    return None
                shown = None
                if tensor is not None:
                    shown = (str(tensor.dtype), str(tensor.device), str((tensor.shape, tensor.stride())))
                facts[name, kind, key] = shown
        for key, known in held.items():
            if key not in _OF_MODULES:
                facts[name, key] = known
    return facts


def _equal(first: Any, other: Any, index: int) -> bool:
    """Whether an attribute of layer `index` means what that of layer 0 means."""
    if type(first) is not type(other):
        return False
    if type(first) in (tuple, list):
        return len(first) == len(other) and all(_equal(a, b, -1) for a, b in zip(first, other))
    if type(first) is int and first == 0 and other == index:
        return True  # the layer's number
    return bool(first == other) if isinstance(first, _PLAIN) else first is other


class ShortModel:
    """A model with the first few layers of another; weights and all else are that one's.

    module: to be called. current: whether it still is what the model is.
    """

    def __init__(self, model: torch.nn.Module, stack: Stack):
        self.stack, self._config = stack, model.config
        config: Any = copy.copy(model.config)
        config.num_hidden_layers = KEPT
        if isinstance(getattr(config, "layer_types", None), (list, tuple)):
            config.layer_types = config.layer_types[:KEPT]
        self._settings = dict(vars(model.config))
        self._pairs = []
        self.module = parent = self._copy(model, config)
        whole = model
        for name in stack.path[:-1]:
            whole = whole._modules[name]  # type: ignore[assignment]
            parent._modules[name] = below = self._copy(whole, config)  # type: ignore[arg-type]
            parent = below
        parent._modules["layers"] = torch.nn.ModuleList(stack.modules[:KEPT])

    def _copy(self, module: torch.nn.Module, config: Any) -> torch.nn.Module:
        made = object.__new__(type(module))
        vars(made).update(vars(module), _modules=dict(module._modules))
        if vars(module).get("config") is self._config:
            vars(made)["config"] = config
        self._pairs.append((module, dict(vars(module)), dict(module._modules)))
        return made

    def current(self) -> bool:
        """Whether neither the model nor its settings were changed since."""
        for module, held, modules in self._pairs:
            now = vars(module)
            if len(now) != len(held) or any(now.get(k) is not v and now.get(k) != v for k, v in held.items()):
                return False
            if len(module._modules) != len(modules) or any(
                module._modules.get(k) is not v for k, v in modules.items()
            ):
                return False
        layers = self._pairs[-1][0]._modules["layers"]
        same = len(layers) == len(self.stack.modules) and all(map(_is, layers, self.stack.modules))  # type: ignore[arg-type]
        return same and vars(self._config) == self._settings


def _is(a: Any, b: Any) -> bool:
    return a is b
