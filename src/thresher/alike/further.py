"""What the layers that a short model lacks bring to one of its graphs: inputs, weights and results."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..compat import source_name
from ..errors import ThresherError
from ..graph.capture import Places
from ..graph.deepen import Unlike, deepen
from ..graph.program import Program
from .depth import Depth, current

_OF_CACHE = re.compile(r"\.layers\[(\d+)\]\.(.+)$")


class Further:
    """Of one graph, which Dynamo made of a short model. Raises Unlike where a layer of it has weights of no name."""

    def __init__(self, gm: fx.GraphModule, places: Places, call: Depth):
        self.layers, self._modules = call.layers, call.modules
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
        inputs = [i for i, role in enumerate(places.roles) if role.startswith("input:")]
        self._of_cache = [_place(nodes[i]) for i in inputs]
        last = self.layers.kept - 1
        like = [
            (i, known[1])
            for i, known in zip(inputs, self._of_cache)
            if known is not None and known[0] == last
        ]
        self._inputs = [(i, name) for i, name in like if name.isidentifier()]
        found = {i: self.layers.of(fqn) for i, (fqn, _) in places.weights.items()}
        self._weights = [
            (i, known[1]) for i, known in found.items() if known is not None and known[0] == last
        ]
        self._named = [
            (self.layers.named(index, name), *self._owner(index, name))
            for index in self.layers.further
            for _, name in self._weights
        ]
        output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
        self._count = len(output.args[0])

    def _owner(self, index: int, name: str) -> tuple[Any, str]:
        """The dict that holds a weight, and its key there."""
        *path, last = name.split(".")
        module = functools.reduce(getattr, path, self._modules[index])
        for held in (module._parameters, module._buffers):
            if isinstance(held.get(last), torch.Tensor):
                return held, last
        raise Unlike(f"Layer {index} has no weight {name}.")

    def live(self) -> dict[str, torch.Tensor]:
        """The further layers' weights as they are now, by FQN."""
        return {fqn: held[key] for fqn, held, key in self._named}

    def inputs(self) -> list[torch.Tensor]:
        """What the current call's cache holds for them, in the order of the program's inputs."""
        if not self._inputs:
            return []
        call = current()
        if call is None or len(call.cache) != len(self.layers.further):
            raise ThresherError("A program of all layers was called without the cache of all layers.")
        return [getattr(layer, name) for layer in call.cache for _, name in self._inputs]

    def split(self, results: Sequence[Any]) -> list[Any]:
        """The short model's results; the others go to the current call."""
        given = list(results[: self._count])
        call = current()
        if call is not None:
            call.given, call.further = given, list(results[self._count :])
        elif len(results) > self._count:
            raise ThresherError("A program of all layers was called as one of few.")
        return given

    def widened(self, places: Places) -> Places:
        """The places with those of the further layers behind."""
        wide = Places(
            list(places.names), list(places.fakes), dict(places.weights), list(places.roles), places.part
        )
        for _ in self.layers.further:
            for i, name in self._inputs:
                wide.names.append(name)
                wide.fakes.append(places.fakes[i])
                wide.roles.append(f"input:{name}")
        numbers = [i for i, _ in self._weights]
        for place, (fqn, held, key) in enumerate(self._named):
            i = numbers[place % len(numbers)]
            wide.weights[len(wide.fakes)] = (fqn, held[key])
            wide.names.append(places.names[i])
            wide.fakes.append(places.fakes[i])
            wide.roles.append(f"weight:{fqn}")
        return wide

    def program(self, short: Program) -> Program:
        """The program of all layers, from the short one as it was captured."""
        known = {fqn: held[key] for fqn, held, key in self._named}
        return deepen(
            short, self.layers, self._of_cache, lambda index, name: known[self.layers.named(index, name)]
        )


def _place(node: fx.Node) -> tuple[int, str] | None:
    """The layer of a cache that an input of Dynamo's is of, and what it is called there."""
    argument = node.meta.get("grapharg")
    found = _OF_CACHE.search(source_name(argument.source)) if argument is not None else None
    return (int(found[1]), found[2]) if found else None
