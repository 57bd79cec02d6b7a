"""Finds the layers of a decoder, tells whether they are alike, and makes a copy of the model that has few of them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..graph.deepen import Layers
from ..hooks import HOOKS, OF_MODULES

KEPT = 3  # the first, whose place is its own, and two that must be the same
LEAST = 6  # layers below which a short model saves little
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
    count = getattr(config, "num_hidden_layers", None)
    if getattr(decoder, "config", None) is not config or count != len(modules):
        return None
    if len(set(getattr(config, "layer_types", None) or [""])) != 1:
        return None
    name = next((n for n, m in model.named_modules() if m is decoder), None)
    if name is None or not alike(modules):
        return None
    return Stack((*name.split("."), "layers") if name else ("layers",), tuple(modules))


def alike(layers: Iterable[torch.nn.Module]) -> bool:
    """Whether layers differ in nothing but their weights' values, which each has for itself, and their number."""
    layers = list(layers)
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
        if any(held.get(hooks) for hooks in HOOKS):
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
            if key not in OF_MODULES:
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

    module: to be called, once `follow` has said that it is what the model is.
    """

    def __init__(self, model: torch.nn.Module, stack: Stack):
        self.stack, self._config = stack, model.config
        self._short: Any = copy.copy(model.config)
        self._pairs: list[tuple[torch.nn.Module, torch.nn.Module, str]] = []
        whole = model
        for name in stack.path:
            self._pairs.append((whole, object.__new__(type(whole)), name))
            whole = whole._modules[name]  # type: ignore[assignment]
        self._layers = torch.nn.ModuleList(stack.modules[:KEPT])
        for module, made, _ in self._pairs:
            vars(made).update(vars(module), _modules={})
        self.module = self._pairs[0][1]
        self.follow()

    def follow(self) -> bool:
        """Take over what was set on the model since; False where its layers are others now, or its forward is."""
        below = [made for _, made, _ in self._pairs[1:]] + [self._layers]
        for (module, made, name), child in zip(self._pairs, below):
            now, held = vars(module), vars(made)
            if "forward" in now:
                return False
            few = {"config": self._short} if now.get("config") is self._config else {}
            _mirror(now, held, {"_modules": held["_modules"], **few})
            _mirror(module._modules, held["_modules"], {name: child})
        layers: Any = self._pairs[-1][0]._modules["layers"]
        if len(layers) != len(self.stack.modules) or not all(map(operator.is_, layers, self.stack.modules)):
            return False
        of_few: dict[str, Any] = {"num_hidden_layers": KEPT}
        kinds = vars(self._config).get("layer_types")
        if isinstance(kinds, (list, tuple)):
            of_few["layer_types"] = kinds[:KEPT]
        name = getattr(self._config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
        of_few[name] = of_few.pop("num_hidden_layers")
        _mirror(vars(self._config), vars(self._short), of_few)
        return True


def _mirror(now: Any, held: Any, apart: dict[str, Any]) -> None:
    """Let `held` hold what `now` does, but for what is `apart`; nothing is written that is there already."""
    for key, known in now.items():
        wanted = apart.get(key, known)
        same = key in held and (
            held[key] is wanted or (key in apart and type(wanted) in (list, tuple) and held[key] == wanted)
        )
        if not same:
            held[key] = wanted
    for key in [k for k in held if k not in now]:
        del held[key]
