"""A compiled model's calls: by a short copy of the model where that says it all, else by the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph.deepen import Unlike
from ..hooks import hooks_of
from ..notices import logger
from ..recipe import Recipe
from . import depth
from .short import Short


class ByLayers:
    """Called as the model is. compile: compiles a module, as Dynamo does. short: what runs calls now, or None."""

    def __init__(self, model: Any, recipe: Recipe, target: str, compile: Callable[[torch.nn.Module], Any]):
        self.model, self._compile = model, compile
        self._whole, self._hooks, self._first = compile(model), hooks_of(model), True
        self.short: Short | None = None
        self._make = lambda: Short.of(model, recipe, target, compile)
        self._may, self._all = True, False

    def look(self) -> None:
        """Have the next call look at all layers: something was set on the model."""
        self._all = True

    def __call__(self, *args: Any, **named: Any) -> Any:
        short = self._current(named) if self._may and not self.model.training else None
        if short is not None and short.takes(args, named):
            try:
                return short(**named)
            except Unlike as reason:
                logger.info("%s is compiled whole: %s", type(self.model).__name__, reason)
                self.short, self._may = None, False
        hooks = hooks_of(self.model)
        if hooks != self._hooks:  # which Dynamo does not look for once it has traced a module
            self._whole, self._hooks, self._first = self._compile(self.model), hooks, True
        with depth.within(None):
            out = self._whole(*args, **named)
        if self._first:  # a call may set hooks itself: transformers' do, to collect hidden states
            self._hooks, self._first = hooks_of(self.model), False
        return out

    def _current(self, named: dict[str, Any]) -> Short | None:
        look, self._all = self._all, False
        if self.short is None or not self.short.follow(named, look):
            self.short = self._make()
            self._may = self.short is not None
        return self.short
